"""Run every command that the documentation gives (make docs-check; a quarter of an hour):

    python tests/docs_check.py

The commands of README.md, in their order, are run as they stand, in a fresh copy of the
repository: so is its Python. Those that take longer than a reader would wait (experiments,
benches), need a released SDXL, or stand in a sentence with "..." in them, are parsed: the script
is started with just these words and stopped when it has read its options. The exercises of
docs/reading.md are made: each patch is applied to a copy, its command run, and what it prints
compared with what the page says is to be seen.

    python tests/docs_check.py --only exercises

The notebook docs/tour.ipynb is run from a clean kernel. --only notebook --write keeps what it shows
in it."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    "miniature/README.md",
]
MEASURES = ("measure", "follow", "compose", "reference", "effect", "train")
LONG = ("bench.", "experiments.", *(f"miniature.{name}" for name in MEASURES))
# Run by tests/test_cli.py and tests/test_live.py.
LONG_SCRIPTS = ("train_space.py", "extras.live")
PARSE = """
import argparse, runpy, sys
real = argparse.ArgumentParser.parse_args
def parse(*args, **kw):
    real(*args, **kw)
    print("parsed")
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, ".")
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands(text: str) -> list[tuple[str, bool]]:
    """(command, whether it stands on a line of its own) of a page, in order."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = []
    own_line, in_text = r"^    (python (?:[^\n]*\\\n)*[^\n]*)$", r"`((?:python|torchrun)\s[^`]+)`"
    for m in re.finditer(f"{own_line}|{in_text}", text, re.M):
        command = " ".join((m[1] or m[2]).replace("\\\n", " ").split())
        found.append((re.sub(r"\s+#\s.*$", "", command), bool(m[1])))
    return found


def copy_to(folder: Path):
    caches = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", "out", *caches))
    for name in ("photo.jpg", "grace_hopper.jpg"):  # the reader's own
        shutil.copy(ROOT / "docs" / "photo.png", folder / name)


def run(words: list[str], where: Path) -> tuple[int, str, float]:
    started = time.time()
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *words], cwd=where, **output)
    return done.returncode, done.stdout, time.time() - started


def short(output: str) -> str:
    return output.strip().splitlines()[-1].split("\r")[-1] if output.strip() else ""


def check_commands(folder: Path) -> int:
    bad = 0
    for page in PAGES:
        if page == "docs/reading.md":  # its exercises are made below
            continue
        for command, alone in commands((ROOT / page).read_text()):
            words = shlex.split(command)
            if words[0] == "torchrun":
                words = words[words.index(next(w for w in words if w.endswith(".py"))) :]
                words = ["python", *words]
            part_of_one = "..." in command or "FILE" in command
            if part_of_one or words[1] == "-c" or words[1:3] == ["-m", "pytest"]:
                continue
            only_named = not alone and not any(word.startswith("--") for word in words)
            words += ["--help"] * (only_named or len(words) == 2)
            target = words[2] if words[1] == "-m" else words[1]
            takes_long = target.startswith(LONG) or target in LONG_SCRIPTS
            takes_long |= "--slider space " in command  # needs what train_space.py makes
            whole = page == "README.md" and alone and not takes_long
            code, output, seconds = run(words[1:] if whole else ["-c", PARSE, *words[1:]], folder)
            good = code == 0
            bad += not good
            report(good, "ran" if whole else "parsed", seconds, f"{page}: {command}")
            if not good:
                print(output[-2000:])
    return bad


def report(good: bool, how: str, seconds: float, what: str):
    print(f"{'ok' if good else 'BAD':4}{how:7}{seconds:5.0f} s  {what}", flush=True)


def check_python(folder: Path) -> int:
    bad = 0
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S):
        code, output, seconds = run(["-c", block], folder)
        bad += code != 0
        report(not code, "ran", seconds, f"README.md: {block.splitlines()[0]} ...")
        if code:
            print(output[-2000:])
    return bad


# ---------------------------------------------------------------------------------------- exercises


def exercises(text: str) -> list[dict]:
    """Of docs/reading.md: {"name", "patches": [(file, old, new)], "commands", "shows": pattern}."""
    found = []
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        patches = []
        for file, body in re.findall(r"^```diff\n--- ([^\n]+)\n(.*?)^```$", part, re.M | re.S):
            lines = body.splitlines()
            side = lambda signs: "\n".join(line[1:] for line in lines if line[:1] in signs)
            patches.append((file, side(" -"), side(" +")))
        if shows := re.search(r"<!-- shows: (.*?) -->", part):
            exercise = {"name": part.splitlines()[0], "patches": patches, "shows": shows[1]}
            found.append(exercise | {"commands": [c for c, alone in commands(part) if alone]})
    return found


def check_exercises(only: str = "") -> int:
    bad = 0
    for exercise in exercises((ROOT / "docs" / "reading.md").read_text()):
        if only not in exercise["name"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "copy"
            copy_to(folder)
            for file, old, new in exercise["patches"]:
                text = (folder / file).read_text()
                if text.count(old) != 1:
                    times = f"holds the lines to change {text.count(old)} times"
                    raise SystemExit(f"{exercise['name']}: {file} {times}")
                (folder / file).write_text(text.replace(old, new))
            done = [run(shlex.split(command)[1:], folder) for command in exercise["commands"]]
        output, seconds = "\n".join(text for _, text, _ in done), sum(t for _, _, t in done)
        good = re.search(exercise["shows"], output) is not None
        bad += not good
        report(good, "ran", seconds, f"{exercise['name']}: {exercise['shows']}")
        lines = [line for line in output.splitlines() if "\r" not in line][-6:]
        print("\n".join(f"        {line}" for line in lines), flush=True)
    return bad


# ----------------------------------------------------------------------------------------- notebook


def check_notebook(write: bool) -> int:
    """Runs docs/tour.ipynb, in TWICE what it says that it takes at most."""
    import nbclient
    import nbformat

    path = ROOT / "docs" / "tour.ipynb"
    notebook, started = nbformat.read(path, 4), time.time()
    said = int(re.search(r"takes about (\d+) minutes", notebook.cells[0].source)[1])
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", resources=where)
    error = ""
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as stopped:
        error = str(stopped)
    seconds = time.time() - started
    good = not error and seconds < 2 * 60 * said
    report(good, "ran", seconds, f"docs/tour.ipynb {error}")
    if write and not error:
        for cell in notebook.cells:
            cell.metadata.clear()  # when each cell ran
        nbformat.write(notebook, path)
    return not good


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", choices=["commands", "exercises", "notebook"])
    p.add_argument("--write", action="store_true", help="keep the notebook's output in it")
    p.add_argument("--exercise", default="", help="only those whose name holds this")
    args = p.parse_args()
    bad = 0
    if args.only in ("commands", None):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "copy"
            copy_to(folder)
            bad += check_commands(folder) + check_python(folder)
    if args.only in ("exercises", None):
        bad += check_exercises(args.exercise)
    if args.only in ("notebook", None):
        bad += check_notebook(args.write)
    print(f"{bad} bad" if bad else "all as the documentation says")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
