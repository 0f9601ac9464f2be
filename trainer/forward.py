"""Forward passes of the policy over rows of the view: which ones a rank makes, laid out, and what comes of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.policies.snapshots import Snapshot
from trainer import arithmetic, attention, kept, sequence
from trainer import engine as engines
from trainer.dealing import deal
from trainer.kept import Kept
from trainer.losses import Batch
from trainer.passes import FILLER, Pass, collate
from trainer.policy import load_tokenizer
from trainer.prefetch import ahead
from trainer.transfer import Packed
from trainer.view import Example, View
from trainer.work import Round, temperature

AHEAD = 2
"""Passes that are read and laid out before they are needed."""

Staged = Pass | Packed[Pass]
"""On a CPU the pass itself."""
Laid = tuple[list[int], Pass]
"""The rows of a pass, none where the rank has nothing left and others do, and the pass."""


@dataclass(frozen=True, slots=True)
class Step:
    """A batch as it is dealt."""

    rows: list[int]
    plan: list[list[list[int]]]
    """[team][pass] -> rows, the same on all ranks."""
    passes: Iterator[Laid]
    """This rank's, on its device, in order; each of them is to be taken."""


class Forward:
    """The policy at work in a DeepSpeed engine. Each rank makes one, and calls its methods when the others do."""

    engine: Any
    kept: Kept | None
    """What was kept beside the policy at work."""

    def __init__(self, work: Round, view: View) -> None:
        self.view, self.settings = view, work.recipe.learning
        self.team = sequence.form(self.settings.sequence_parallel)
        self.attention = attention.chosen(self.settings) if self.settings.packing else None
        """Kernel of packed passes; null where passes are padded."""
        self.pad = load_tokenizer(work.policy).pad_token_id or 0
        self._work = work

    def start(self, policy: Path, snapshot: Snapshot) -> None:
        """Takes up a policy, whose record is `snapshot`; lets go of the last: two might not fit where one does."""
        if hasattr(self, "engine"):
            self.engine.destroy()
            del self.engine
            gc.collect()
        recipe = self._work.recipe
        sampled_at = temperature(self.view, recipe.generation.temperature)
        self.kept = kept.find(self._work.out, policy, snapshot, self.settings)
        self.engine = engines.start(recipe, policy, sampled_at, self.team, self.kept)
        self.arithmetic = arithmetic.of_model(self.engine.module.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.engine.device
        return device

    @contextlib.contextmanager
    def steps(self, batches: Iterable[list[int]]) -> Iterator[Iterator[Step]]:
        """The batches, dealt; their passes are read and laid out while earlier ones are computed."""
        with ahead(self._laid_out(batches), AHEAD) as items:
            yield self._steps(items)

    def _steps(self, items: Iterator[Any]) -> Iterator[Step]:
        for rows, plan in items:
            mine = (next(items) for _ in plan[self.team.number])
            passes = ((part, self.arrived(staged)) for part, staged in mine)
            yield Step(rows, plan, passes)

    def _laid_out(self, batches: Iterable[list[int]]) -> Generator[Any, None, None]:
        """(rows, plan) of each batch, and behind it its passes. In a thread of its own, which alone uses the view."""
        budget = self.settings.micro_batch_tokens * self.team.size
        for rows in batches:
            # Each rank computes the same plan from the same index, so nothing needs to be sent.
            plan = deal(rows, self.view.sizes, budget, self.team.count, self.arithmetic)
            yield rows, plan
            for part in plan[self.team.number]:
                yield (
                    part,
                    self.staged([self.view.learnable(row) for row in part], self.view.sizes.group[part].tolist()),
                )

    def staged(self, examples: Sequence[Example], groups: Sequence[int]) -> Staged:
        """Examples laid out for a pass and ready to travel; `groups` are neighbours. Without any, what fills one up."""
        taken = collate(examples or [FILLER], groups or [0], self.pad, self.attention, self.team)
        if self.device.type == "cpu":
            return taken
        with torch.cuda.device(self.device):  # a thread has its own
            return Packed(taken, pin=True)

    def arrived(self, staged: Staged) -> Pass:
        """The pass on the device, by one copy that nobody waits for."""
        return staged.on(self.device) if isinstance(staged, Packed) else staged

    def logprobs(self, taken: Pass) -> torch.Tensor:
        """log pi of each completion token, zero outside of the mask: [sequences, longest completion]."""
        return engines.score(self.engine, taken)

    def scored(self, taken: Pass) -> Batch:
        """What the losses take."""
        return Batch(self.logprobs(taken), taken.behaviour, taken.mask, taken.advantage, taken.reward, taken.sampled)
