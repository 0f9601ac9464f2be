"""One's own verifier: a plain function, named by its import path where a prompt has its `task`.

::

    def judge(completion: Completion, reference: Reference) -> Outcome | float: ...

It runs in a worker that is killed after `verification.code_timeout_s`; modules that take long to import are named in
the module's `PRELOAD`, a tuple, and don't count. Whatever it raises makes the verdict `crashed`. A number is a reward:
1 is correct, less is wrong with that much credit. It is trusted code of the user's: programs it is given to judge are
not kept apart unless it does so.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError
from pipeline.modules import import_own
from pipeline.verifiers.cases import REWARDS, Alive, Case, Completion, Outcome, Reference, Verifier, shorten

if TYPE_CHECKING:
    from pipeline.recipe import Verification


def load_custom(path: str) -> Verifier:
    """The verifier of an import path `package.module:function`. Raises RequestError where there is none."""
    module_name, _, name = path.partition(":")
    try:
        module = import_own(module_name)
        function = getattr(module, name)
    except Exception as error:  # noqa: BLE001  a user's module may raise anything while it is imported
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise RequestError(f"no verifier {path!r}: {reason}; name it module:function") from None
    if not callable(function):
        raise RequestError(f"no verifier {path!r}: {name} is no function")

    def judge(case: Case, settings: Verification, alive: Alive) -> Outcome:
        alive(settings.code_timeout_s)
        return _as_outcome(function(Completion(case.id, case.response), Reference(case.answer, case.tests)), path)

    preload = tuple(getattr(module, "PRELOAD", ()))
    version = functools.partial(_version, module, function)
    return Verifier(name=path, version=version, glance=lambda case: case, judge=judge, preload=preload)


def _as_outcome(said: Any, path: str) -> Outcome:
    if isinstance(said, Outcome) and said.status in REWARDS:
        return said
    if isinstance(said, int | float) and math.isfinite(said):
        return Outcome("correct" if said >= 1 else "wrong", f"reward {float(said):g}", reward=float(said))
    raise TypeError(f"{path} returned {said!r:.100}; expected an Outcome with a known status, or a finite number")


def _version(module: Any, function: Callable[..., Any]) -> str:
    """The module's VERSION, else a hash of its source: a changed verifier is another version."""
    given = getattr(module, "VERSION", None)
    if given is not None:
        return str(given)
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        source = repr(function)
    return "source-" + hashlib.sha256(source.encode()).hexdigest()[:12]
