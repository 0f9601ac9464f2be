"""A verifier that takes the Ray worker above it down, once: the answer is a file that says that it was done."""

from __future__ import annotations

from pathlib import Path

import psutil

from pipeline.verifiers.cases import Completion, Reference


def judge(completion: Completion, reference: Reference) -> float:
    assert reference.answer is not None
    done = Path(reference.answer)
    if not done.exists():
        done.touch()
        for above in psutil.Process().parents():
            if above.cmdline()[:1] and above.cmdline()[0].startswith("ray::"):
                above.kill()
    return float(len(completion.response) % 2 == 0)
