"""What the documentation names is there: links, headings, paths and modules."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from persons_folder import TAKEN

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("assets", "pipeline", "trainer", "benchmarks")
FOLDERS = (*PACKAGES, "tests", "docs", "deploy", "requirements")


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    # The fixtures' pages are of their time.
    return [REPOSITORY / name for name in listed.stdout.splitlines() if not name.startswith("tests/fixtures/")]


@cache
def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


def missing_links(page: Path, text: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in headings(place)):
            wrong.append(target)
    return wrong


def missing_paths(text: str) -> list[str]:
    """Of what stands in backticks: what begins as a folder of ours, and any Python file."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*\-]+)`", text)
    missing = [path for path in named if not any(REPOSITORY.glob(path.rstrip("/")))]
    files = [file for file in re.findall(r"`([\w/]+\.py)`", text) if file not in named]
    # A page may leave out the folders above, where the name says enough; and it may speak of a person's own files.
    return missing + [file for file in files if file not in TAKEN and not any(place.match(file) for place in sources())]


@cache
def sources() -> list[Path]:
    return [file for folder in (*PACKAGES, "tests") for file in (REPOSITORY / folder).rglob("*.py")]


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_there(dotted: str) -> bool:
    """A module of ours, or a name in one."""
    place = REPOSITORY
    parts = dotted.replace(":", ".").split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    file = place / f"{parts.pop(0)}.py" if parts and (place / f"{parts[0]}.py").is_file() else place / "__init__.py"
    return not parts or (file.is_file() and parts[0] in names_in(file))


def missing_modules(text: str) -> list[str]:
    """Of dotted names anywhere, code blocks among them."""
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})(?:[.:](?!py\b)\w+)+)", text)
    return [name for name in named if not is_there(name)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_links(page, text) == []
    assert missing_paths(text) == []
    assert missing_modules(text) == []


def test_what_is_not_there_is_found() -> None:
    page = REPOSITORY / "README.md"
    assert missing_links(page, "[a](docs/none.md) [b](README.md#no-such-heading) [c](README.md#try-it)") == [
        "docs/none.md",
        "README.md#no-such-heading",
    ]
    said = "`pipeline/prompts.py` `pipeline/recipe.py` `tests/*/test_docs.py` `inside.py` `generation/fleet.py`"
    assert missing_paths(said) == ["pipeline/prompts.py", "inside.py"]
    assert missing_modules("pipeline.verifiers.gym:judge, python -m pipeline.smollm2, trainer.learner.learned") == [
        "pipeline.smollm2",
        "trainer.learner.learned",
    ]
