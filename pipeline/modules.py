"""Which module a name stands for: ours and what is installed come first, a person's own folder last, in every process.

`python -m` puts the current folder in front of everything, so that a `trainer.py`, a `pipeline/` or a `gql.py` of
one's own would be taken for ours, or for what Dagster installs. Every child is therefore started with a safe path
(Python's `-P`), and what children start in turn hears of it through PYTHONSAFEPATH.

Modules that a person names (a verifier, `module:function`) are looked for among what is installed and on PYTHONPATH,
then in the folders of OAPL_MODULES, separated by colons; unless it is set, that is the folder in which the command
was started.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from pipeline.errors import RequestError

SAFE, OWN = "PYTHONSAFEPATH", "OAPL_MODULES"


def python(module: str, *words: object) -> list[str]:
    """The command that runs one of our modules as a process of its own.

    Raises RequestError where Python would find another package of that name: PyPI has a `trainer`, too.
    """
    package = module.partition(".")[0]
    found = find_spec(package)
    if found is None or found.origin is None or Path(found.origin).parents[1] != Path(__file__).parents[1]:
        where = "not to be found" if found is None else f"another package here ({_place_of(found)})"
        raise RequestError(
            f"{package!r} is {where}; install oapl into an environment of its own, and look at PYTHONPATH"
        )
    return [sys.executable, "-P", "-m", module, *map(str, words)]


def _place_of(found: ModuleSpec) -> str:
    return found.origin or ", ".join(found.submodule_search_locations or ())


def told() -> dict[str, str]:
    """What the environment of a child says of the rule above; folders absolute, since it may start elsewhere."""
    folders = os.environ.get(OWN, ".").split(os.pathsep)
    return {SAFE: "1", OWN: os.pathsep.join(str(Path(folder).absolute()) for folder in folders if folder)}


def settle() -> None:
    """Called where a command begins: fixes the rule for this process and all below it."""
    os.environ |= told()


def import_own(name: str) -> ModuleType:
    """The module that a person named, found by the rule above. Raises what importing it raises."""
    for folder in os.environ.get(OWN, "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)  # behind everything, and for what the module imports later, too
    return importlib.import_module(name)
