"""Forward passes of the policy over rows of the view: which ones a rank makes, laid out, and what comes of them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.policies import snapshots
from trainer import attention, batches, kept, sequence
from trainer import engine as engines
from trainer.kept import Kept
from trainer.losses import Batch
from trainer.passes import Pass, collate
from trainer.policy import load_tokenizer
from trainer.view import View
from trainer.work import Round, temperature


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

    def start(self, policy: Path) -> None:
        """Takes up a policy, and lets go of the one before: two at once would not fit where one hardly does."""
        if hasattr(self, "engine"):
            self.engine.destroy()
            del self.engine
            gc.collect()
        recipe = self._work.recipe
        sampled_at = temperature(self.view, recipe.generation.temperature)
        self.kept = kept.find(self._work.out, policy, snapshots.load_record(policy), self.settings)
        self.engine = engines.start(recipe, policy, sampled_at, self.team, self.kept)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.engine.device
        return device

    # Each rank computes the same plan from the same index, so nothing needs to be sent.
    def plan(self, rows: Sequence[int]) -> list[list[int]]:
        """This rank's forward passes. All ranks get equally many: collectives in them must pair up."""
        shares = batches.split_over_ranks(rows, self.view.sizes, self.team.count)
        budget = self.settings.micro_batch_tokens * self.team.size
        plans = [batches.micro_batches(share, self.view.sizes, budget) for share in shares]
        passes = max(len(plan) for plan in plans)
        mine = plans[self.team.number]
        return mine + [[]] * (passes - len(mine))

    def laid_out(self, rows: Sequence[int]) -> Pass:
        """The rows as one pass; a rank that has none computes some row, and nothing is done with it."""
        rows = rows or [0]
        examples = [self.view.learnable(row) for row in rows]
        return collate(examples, self.view.sizes.group[rows].tolist(), self.pad, self.attention).to(self.device)

    def logprobs(self, taken: Pass) -> torch.Tensor:
        """log pi of each completion token, zero outside of the mask: [sequences, longest completion]."""
        return engines.score(self.engine, taken)

    def scored(self, taken: Pass) -> Batch:
        """What the losses take."""
        return Batch(self.logprobs(taken), taken.behaviour, taken.mask, taken.advantage, taken.reward, taken.sampled)
