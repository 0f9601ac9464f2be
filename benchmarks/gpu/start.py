"""Does the learner start and step where there is no compiler? And what the card reaches at its best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.device import describe, device, median, peak_rate
from benchmarks.gpu.policies import Scale, engine_of, examples_of, laid_out, learn, recipe, usual_kernel
from benchmarks.gpu.report import Section

COMPILERS = ("CUDA_HOME", "CUDA_PATH", "CC", "CXX", "CUDAHOSTCXX", "NVCC_APPEND_FLAGS")
ROOT = Path(__file__).parents[2]


def measure(section: Section, scale: Scale) -> None:
    compiled = section.expect("steps of a learner that finds no compiler", "at least", 1.0)

    def matmul() -> None:
        size = 256 if scale.small else 8192
        left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / median(lambda: left @ right, 10)
        best = peak_rate(describe(scale.small)["device"])
        section.add(f"bfloat16 product, {size:,} wide", tflops=rate / 1e12, of_peak=rate / best if best else None)

    def bare() -> None:
        found = without_compiler(section.left)
        section.add("first step without a compiler", **found)
        compiled.meet(found["steps"])

    section.steps({"matrix product": matmul, "engine without a compiler": bare})


def without_compiler(seconds: float) -> dict[str, float]:
    """Starts the learner's engine in a child that sees no compiler, toolkit or cache of compiled code."""
    with tempfile.TemporaryDirectory() as empty:
        kept = {name: value for name, value in os.environ.items() if name not in COMPILERS}
        caches = {name: empty for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        told = {**kept, **caches, "PATH": empty}
        words = [sys.executable, "-m", "benchmarks.gpu", "bare"]
        done = subprocess.run(
            words, cwd=ROOT, env=told, capture_output=True, text=True, timeout=max(30.0, seconds), check=False
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"the child ended with {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bare() -> dict[str, float]:
    """In that child: one optimizer step of the recipe's engine on a small bfloat16 policy; how far a weight moved."""
    import time

    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = None  # found at /usr/local/cuda even where nobody names it
    shape = Scale(not torch.cuda.is_available()).probe
    kernel = usual_kernel()
    settings = recipe(256, attention=kernel, learning_rate=1e-3)
    started = time.perf_counter()
    with engine_of(shape, settings) as engine:
        ready = time.perf_counter() - started
        before = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
        taken = laid_out(examples_of("group of 8", 256, shape.vocabulary), kernel)
        engine.set_gradient_accumulation_boundary(True)
        learn(engine, taken, settings.learning, engine.backward, 8)
        engine.step()
        moved = max((weight - before[name]).abs().max().item() for name, weight in engine.module.named_parameters())
    stepped = time.perf_counter() - started - ready
    if not moved > 0:
        raise RuntimeError("the optimizer's step moved no weight")
    return {"steps": 1.0, "start_s": ready, "step_s": stepped, "moved": moved}
