"""The learner's own way from weights on the card to a snapshot on the disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.gpu.policies import Scale, recipe, scored, usual_kernel
from benchmarks.gpu.report import Section
from pipeline.policies import snapshots
from trainer import engine as engines
from trainer.policy import save_policy

OFF = 0.01


def measure(section: Section, scale: Scale) -> None:
    whole = section.expect("bytes published against the weights there are, relative", "at most", OFF)
    settings = recipe(scale.tokens[1])

    def published() -> None:
        module = scored(scale.shape, settings.learning, usual_kernel())
        needed = 2 * scale.shape.parameters
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free
            if free < 1.2 * needed:
                section.leave_out("publishing", f"{free / 2**30:.0f} GiB free in {folder}; set TMPDIR")
                return
            out, spent = Path(folder), {}
            started = time.perf_counter()
            state = engines.gathered(SimpleNamespace(module=module), settings.learning)
            spent["gather_s"] = time.perf_counter() - started

            def fill(partial: Path) -> None:
                began = time.perf_counter()
                save_policy(module.model, out, partial, state)
                spent["write_s"] = time.perf_counter() - began

            made = snapshots.publish(out, fill, parent=None, round=0, step=1, recipe_sha256=settings.digest())
            seconds = time.perf_counter() - started
            written = sum(_weights_in(path) for path in (out / made.snapshot_id).glob("*.safetensors"))
        spent["hash_and_sync_s"] = seconds - sum(spent.values())
        section.add("publishing", gib=written / 2**30, seconds=seconds, gib_s=written / 2**30 / seconds, **spent)
        whole.meet(abs(written - needed) / needed)

    section.steps({"publishing": published})


def _weights_in(path: Path) -> int:
    """Bytes behind the header, whose length stands in the first eight."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
