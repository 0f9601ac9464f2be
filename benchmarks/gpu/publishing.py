"""The learner's own way from weights on the card to a snapshot on the disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.gpu.policies import Scale, be_the_only_rank, recipe, scored, usual_kernel
from benchmarks.gpu.report import Section
from pipeline.policies import snapshots
from pipeline.rollouts.locate import Located
from trainer.work import Round
from trainer.writing import publish

OFF = 0.01


def measure(section: Section, scale: Scale) -> None:
    whole = section.expect("bytes published against the weights there are, relative", "at most", OFF)
    # Nothing is kept beside the snapshot, which would be measured, too; the module's own dtype is what is published.
    settings = recipe(scale.tokens[1], dtype="float32", attention="sdpa", keep_optimizer=False)

    def published() -> None:
        be_the_only_rank()
        module = scored(scale.shape, settings.learning, usual_kernel())
        needed = 2 * scale.shape.parameters
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            free = shutil.disk_usage(folder).free
            if free < 1.2 * needed:
                section.leave_out("publishing", f"{free / 2**30:.0f} GiB free in {folder}; set TMPDIR")
                return
            parent = snapshots.publish(folder, _start, parent=None, round=None, step=0, recipe_sha256=None)
            engine = SimpleNamespace(module=module, optimizer=SimpleNamespace(state={}))
            place, log = Located(folder, folder, None, None, None), folder / "learning.jsonl"
            work = Round(settings, place, folder / parent.snapshot_id, folder, log, 0)
            started = time.perf_counter()
            snapshot_id, _ = publish(engine, work, parent, None, 1)
            seconds = time.perf_counter() - started
            written = sum(_weights_in(path) for path in (folder / snapshot_id).glob("*.safetensors"))
        section.add("publishing", gib=written / 2**30, seconds=seconds, gib_s=written / 2**30 / seconds)
        whole.meet(abs(written - needed) / needed)

    section.steps({"publishing": published})


def _start(folder: Path) -> None:
    """A policy whose weights lie elsewhere: what is compared with them is left out."""
    (folder / "config.json").write_text("{}", encoding="utf-8")


def _weights_in(path: Path) -> int:
    """Bytes behind the header, whose length stands in the first eight."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
