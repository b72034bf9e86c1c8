"""Imports point one way: commands to the method and the model, never back. Those inside functions
count too."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"slider", "train_text", "train_pairs", "train_space"}
METHOD = {"lora", "sampler", "student", "invert"}
AROUND = {"extras", "miniature", "experiments", "bench", "tests"}
FILES = [
    file
    for file in ROOT.rglob("*.py")
    if not any(part.startswith(".") or part == "out" for part in file.relative_to(ROOT).parts)
]


def name_of(file: Path) -> str:
    """support/cli.py -> support.cli"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES if file.parent.name != "tests"}


def imported_names(file: Path) -> set[str]:
    """Every name that the file imports, dotted: "support.cli.run" of `from support.cli import run`,
    wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(file: Path) -> set[str]:
    """The project's modules that the file imports."""
    found = set()
    for name in imported_names(file):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found


GRAPH = {module: imports(file) for module, file in MODULES.items()}


def folder(module: str) -> str:
    """ "" for a module at the top."""
    return module.partition(".")[0] if "." in module or MODULES[module].stem == "__init__" else ""


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(GRAPH).prepare()  # CycleError names the circle


def test_the_graph_is_the_projects():
    """The rules below would hold for an empty graph too."""
    assert len(GRAPH) > 40 and {"sampler", "support.merge"} <= GRAPH["support.sweep"]
    assert {"support.cli", "support.checkpoint", "student"} <= GRAPH["train_text"]


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_one_way(module):
    found = GRAPH[module]
    if module == "sdxl_unet":
        assert found <= {"support.graphs"}
    elif module == "support.graphs":
        assert not found
    elif module == "sdxl_vae":
        assert found <= {"sdxl_unet"}
    if module in ("lora", "sampler"):
        assert not found & {"lora", "sampler"}
    if folder(module) == "formats":
        assert {folder(name) for name in found} <= {"formats"}
    if module in METHOD | {"sdxl"} or folder(module) == "support":
        assert not found & COMMANDS
    if folder(module) in ("", "support", "formats"):
        assert not {folder(name) for name in found} & AROUND
    if folder(module) in ("extras", "miniature"):
        assert not {folder(name) for name in found} & {"experiments", "bench", "tests"}
    if folder(module) == "miniature":
        assert {name for name in found if folder(name) == "extras"} <= {"extras.metrics"}
