"""What a person can see of learning: the log, the gap, speed and memory."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import RequestError
from pipeline.planning.memory import learner_memory
from pipeline.policies.shapes import GIB, shape_of
from pipeline.recipe import Recipe
from pipeline.storage.durable import write_durably
from trainer.peaks import peak


class Gap:
    """Trainer's minus another's log-probability of the same tokens, in nats, by tokens and by sequences."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._worst = torch.zeros((), device=device)

    def add(self, trainer: Tensor, other: Tensor, mask: Tensor) -> None:
        """[sequences, tokens] each; tokens that the other said nothing of (not a number) are left out."""
        counted = mask & ~other.isnan()
        gap = (trainer - other).masked_fill(~counted, 0.0)
        sequences = counted.any(dim=1)
        self._sums += torch.stack([gap.double().sum(), gap.double().abs().sum(), counted.sum(), sequences.sum()])
        self._worst = torch.maximum(self._worst, gap.abs().max())

    def over_ranks(self) -> dict[str, float]:
        """Over all ranks, each of which calls it: mean, mean_abs and max_abs of a token, tokens; and what a loss over
        whole sequences feels, the mean of their sums, `sequence_mean`, with how many `sequences` there were."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        summed, summed_abs, tokens, sequences = self._sums.tolist()
        each = max(1.0, tokens)
        return {
            "mean": summed / each,
            "mean_abs": summed_abs / each,
            "max_abs": self._worst.item(),
            "tokens": tokens,
            "sequence_mean": summed / max(1.0, sequences),
            "sequences": sequences,
        }


class Log:
    """The learning log: one JSON line an optimizer step, and the same for TensorBoard; rank 0 writes.

    What an earlier process wrote of the steps `done` is kept, so that a resumed round has one whole log.
    """

    def __init__(self, path: Path, tensorboard: bool, done: range) -> None:
        self._file: IO[str] | None = None
        self._board: Any = None
        if dist.get_rank() != 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] in done]
        write_durably(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.with_suffix("")), purge_step=done.stop)  # type: ignore[no-untyped-call]

    def add(self, record: dict[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(f"learning/{name}", value, int(record["step"]))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines of a log; the last one of a killed process may lack its end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class Speed:
    """What people compare runs by, of each step and of all: tokens a second, model FLOPs utilisation, memory."""

    def __init__(self, device: torch.device, dtype: str, ranks: int) -> None:
        self._device, self._ranks = device, ranks
        self._peak = peak(device, dtype)
        self._tokens = self._flops = self._seconds = 0.0
        self._memory: dict[str, float] = {}

    def step(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        """For the log. `flops`: of all ranks together, as `arithmetic` counts. Each rank calls it."""
        self._tokens, self._flops, self._seconds = self._tokens + tokens, self._flops + flops, self._seconds + seconds
        name, held = peak_memory(self._device)
        most = torch.tensor(held, dtype=torch.float64, device=self._device)
        if self._ranks > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self._memory = {name: round(most.item(), 4)}
        return rates(tokens, flops, seconds, self._ranks, self._peak.flops) | self._memory

    def told(self) -> dict[str, Any]:
        """For the summary: over the steps of this process, and what the utilisation is a share of."""
        peak = {"peak_flops": self._peak.flops, "peak_flops_source": self._peak.source}
        if not self._seconds:
            return peak
        return rates(self._tokens, self._flops, self._seconds, self._ranks, self._peak.flops) | self._memory | peak


def rates(tokens: float, flops: float, seconds: float, ranks: int, peak: float) -> dict[str, float]:
    """Completion tokens a second, in all and a rank, and model FLOPs utilisation; `peak`: of one rank's device."""
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds / ranks,
        "mfu": flops / seconds / (peak * ranks),
    }


def peak_memory(device: torch.device) -> tuple[str, float]:
    """The most that this rank held so far, GiB, and its name: tensors on a card, or, on a CPU, all that is resident."""
    if device.type == "cpu":
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return "peak_resident_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return "peak_memory_gib", torch.cuda.max_memory_allocated(device) / GIB


def planned_memory(recipe: Recipe, policy: Path, ranks: int) -> float | None:
    """What `oapl plan` foretells of a rank's memory for this policy, GiB; null where it does not know such models."""
    settings = recipe.learning.model_copy(update={"ranks": ranks})
    try:
        shape = shape_of(recipe, policy)
    except RequestError:  # learning needs no plan
        return None
    card = torch.cuda.get_device_properties().total_memory / GIB if torch.cuda.is_available() else None
    planned = learner_memory(recipe.model_copy(update={"learning": settings}), shape, settings.zero_stage, card)
    return planned.total(settings.activation_checkpointing) / GIB
