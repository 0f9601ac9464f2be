"""A folder of a person's, in which names are taken that are ours, or those of packages that we need."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

TAKEN = (
    "trainer.py",
    "assets/__init__.py",
    "pipeline/__init__.py",
    "gql.py",
    "dagster.py",
    "torch.py",
    "numpy.py",
    "yaml.py",
    "sitecustomize.py",
)


def fill(folder: Path) -> Path:
    """Puts them there; whoever imports one of them ends, and says which it was."""
    for name in TAKEN:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise SystemExit('{name} of a person was imported')\n")
    return folder


@functools.cache
def persons_folder() -> Path:
    """One for all tests of this process, to start commands in."""
    return fill(Path(tempfile.mkdtemp(prefix="oapl-person-")))
