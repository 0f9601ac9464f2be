"""The longest pass of the data, tried before anything else: what needs too much memory says so at once."""

from __future__ import annotations

import numpy as np
import torch

from trainer.dealing import deal
from trainer.forward import Forward


def longest_pass(forward: Forward) -> None:
    """One forward and backward pass over the longest sequences, as many as a pass takes, of a loss that weighs nothing.

    Gradients of zero are added to what the first step accumulates, so no weight and no moment is another for it. Each
    rank calls it. Raises torch.OutOfMemoryError where a step would.
    """
    sizes, settings = forward.view.sizes, forward.settings
    lengths = sizes.prompt + sizes.completion
    by_length = np.argsort(-lengths, kind="stable")
    all_teams = settings.micro_batch_tokens * forward.team.size * forward.team.count
    # The last of them goes past what all teams' passes hold; one more a team, since a longest one may go alone.
    most = int(np.searchsorted(np.cumsum(lengths[by_length]), all_teams)) + forward.team.count
    rows = sorted(by_length[: min(most, settings.batch_size)].tolist())
    budget = settings.micro_batch_tokens * forward.team.size
    dealt = deal(rows, sizes, budget, forward.team.count, forward.arithmetic)[forward.team.number]
    part = max(dealt, key=sizes.of)
    examples = [forward.view.example(row) for row in part]  # their log-probabilities don't matter yet
    taken = forward.arrived(forward.staged(examples, sizes.group[part].tolist()))
    forward.engine.set_gradient_accumulation_boundary(False)
    forward.engine.backward(forward.logprobs(taken).sum() * 0.0)
    forward.engine.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an error of the device is to be told here
