"""What a machine with a card, PyTorch and transformers, but no network, needs besides: wheels, fetched beforehand.

    python -m benchmarks.gpu wheels --out wheels/
    python -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl && export PYTHONPATH=/tmp/site   # there

DeepSpeed is source on PyPI and is built here, without its compiled parts, which the learner does not use: a wheel for
every machine. The others are as they lie on PyPI, for the other machine's Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.report import show
from pipeline.errors import WorkError

BUILT = ("deepspeed",)
FETCHED = ("hjson", "py-cpuinfo", "pydantic", "pydantic_core", "annotated-types", "typing-inspection")
"""What DeepSpeed and the learner import beside torch, transformers, numpy, pyarrow, PyYAML, tqdm, psutil, einops,
msgpack, ninja and packaging."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LOCK = Path(__file__).parents[2] / "requirements" / "cpu.txt"


def fetch(out: Path, python: str, also: Sequence[str]) -> None:
    """Puts the wheels into `out`, in the versions of the lock, for that Python on 64-bit x86 Linux, and lists them."""
    out.mkdir(parents=True, exist_ok=True)
    locked = _locked()
    _pip("wheel", "--no-deps", "--wheel-dir", out, *(locked[name] for name in BUILT))
    tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    told = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *tags]
    _pip("download", *told, "--dest", out, *(locked.get(name, name) for name in (*FETCHED, *also)))
    wheels = sorted(out.glob("*.whl"))
    for wheel in wheels:
        print(f"{show(wheel.stat().st_size):>12} bytes  {wheel.name}")
    print(f"{show(sum(wheel.stat().st_size for wheel in wheels)):>12} bytes in all")


def _locked() -> dict[str, str]:
    """name==version by name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: f"{name}=={version}" for name, version in found}


def _pip(*words: str | Path) -> None:
    told = {**os.environ, "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise WorkError(f"pip {words[0]}: {lines[-1] if lines else done.stderr[-300:]}")
