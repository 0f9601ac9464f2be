"""What a person can see of learning: the log, the gap, and how much of the machine is used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.storage.durable import write_durably
from trainer.passes import Pass


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


class Work:
    """Counts the arithmetic of a training step: matrix products with weights, six operations a weight and token."""

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
        self._body: int = sum(module.in_features * module.out_features for module in linear)
        self._head: int = head.in_features * head.out_features

    def flops(self, taken: Pass) -> int:
        """Of forward and backward pass, without attention and without what is computed twice."""
        return 6 * (self._body * taken.ids.numel() + self._head * taken.targets.numel())


def matmul_flops(device: torch.device, size: int = 1024, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second that a float32 matrix product of this size reaches here, the best of five."""
    left, right = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        started = clock()
        (left @ right).sum().item()
        best = min(best, clock() - started)
    return 2 * size**3 / best
