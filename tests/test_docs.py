"""README and docs against the code: links to lines, files and anchors.  `python
tests/test_docs.py` brings the line numbers up to date."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from docs_check import commands, exercises

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "miniature" / "README.md",
]
TO_LINE = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)")  # [`Slider._hook`](lora.py#L129)


def line_of(file: Path, name: str) -> int:
    """Where `name`, "function", "Class" or "Class.method", is defined. KeyError if it is not."""
    nodes = ast.parse(file.read_text()).body
    for part in name.split("."):
        node = {n.name: n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}[part]
        nodes = node.body
    return node.lineno


def relinked(page: Path) -> str:
    """The page with every link to a function leading to the line where it is now."""

    def link(m):
        name, file = m[1], m[2]
        return f"[`{name}`]({file}#L{line_of(page.parent / file, name)})"

    return TO_LINE.sub(link, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_where_they_say(page):
    text = page.read_text()
    assert relinked(page) == text, "python tests/test_docs.py mends the line numbers"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor and not re.fullmatch(r"L\d+", anchor):
            headings = re.findall(r"^#+ (.*)$", to.read_text(), re.M)
            slug = lambda heading: re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_every_equation_has_its_line():
    """The map in README: each of the paper's equations leads to a line."""
    text = (ROOT / "README.md").read_text()
    table = text.split("## Where each equation lives")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 9 and all(TO_LINE.search(row) for row in rows)


def options_of(words: list[str]) -> dict[str, list[str]]:
    """{--option: its values}, but for --out and, as it follows from the ends, --prompt."""
    found: dict[str, list[str]] = {}
    for word in words[1:]:
        found.setdefault(word, []) if word.startswith("--") else found[[*found][-1]].append(word)
    return {
        option: values for option, values in found.items() if option not in ("--out", "--prompt")
    }


def test_what_is_measured_are_the_sliders_that_a_reader_is_told_to_train():
    """experiments/defaults.py and bench/published.py train miniature/compose.py's words."""
    from miniature import compose  # here: `python tests/test_docs.py` does without it

    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/guide.md"))
    told = [shlex.split(command)[1:] for command, alone in commands(pages) if alone]
    told = [options_of(words) for words in told if words[0] == "train_text.py"]
    for attribute in ("age", "smile", "eye_size"):
        assert options_of(compose.command(attribute)) in told, attribute


def test_the_exercises_patches_fit():
    for exercise in exercises((ROOT / "docs" / "reading.md").read_text()):
        for file, old, _ in exercise["patches"]:
            assert (ROOT / file).read_text().count(old) == 1, exercise["name"]


if __name__ == "__main__":
    for page in PAGES:
        if (text := relinked(page)) != page.read_text():
            page.write_text(text)
            print(f"{page}: written")
