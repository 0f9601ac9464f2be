"""Do engine and trainer agree on the frozen policy? Measured before anything is learned, on the data itself.

Here, too, log-probabilities are recomputed where the recipe asks for that, and a packed pass is held against its
sequences one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import RequestError, WorkError
from pipeline.policies.snapshots import Snapshot
from pipeline.recipe import Learning
from trainer import attention, insight, reference
from trainer.forward import Forward
from trainer.passes import collate, shortened
from trainer.view import Sizes
from trainer.work import UNKNOWN, Round

GAP_ROWS = 256
"""Completions on which engine and trainer are compared before learning."""
LEAK_TOKENS = {True: 1024, False: 48}
"""Tokens of a prompt, and of a completion, that packed and single passes are compared on, on a card or on a CPU."""


def compare(forward: Forward, work: Round, behaviour: Snapshot) -> dict[str, Any]:
    """Holds the behaviour policy, which is at work in `forward`, against what the engine said of its tokens.

    Recomputes log-probabilities where the recipe asks for that. Returns facts for the summary. Raises RequestError
    where packed passes differ from single ones, WorkError where the gap is past the recipe's bound.
    """
    forward.engine.eval()
    with torch.no_grad():
        if forward.attention is not None:
            _refuse_leaks(forward, work)
        attach_references(forward, work, behaviour, compute=True)
        facts = _measure(forward, work)
    forward.engine.train()
    return facts


def attach_references(forward: Forward, work: Round, behaviour: Snapshot, *, compute: bool) -> None:
    """Recomputed log-probabilities where the recipe asks for them: found beside the data, or computed now."""
    settings, view = forward.settings, forward.view
    if settings.behaviour == "engine":
        return
    for place, manifest in enumerate(view.manifests):
        folder = work.reference(view.places[place], manifest)
        made_by = manifest.provenance.snapshot_sha256
        policy = made_by if made_by not in ("", UNKNOWN) else behaviour.sha256
        identity = {
            "dataset": manifest.digest,
            "policy": policy,
            "temperature": forward.engine.module.temperature,
            "dtype": settings.dtype,
        }
        found = reference.find(folder, identity)
        if found is None:
            if policy != behaviour.sha256 or not compute:
                raise RequestError(
                    f"{view.places[place].root}: written by snapshot {manifest.provenance.snapshot_id}, and "
                    f"{work.behaviour or work.policy} can't recompute what that one sampled; name that "
                    "snapshot as the behaviour policy, or set learning.behaviour=engine"
                )
            blocks = [block for block in view.blocks if block.place == place]
            found = reference.recompute(folder, identity, blocks, forward)
        view.attach(place, found)


def _refuse_leaks(forward: Forward, work: Round) -> None:
    """Compares a packed pass with its sequences one by one, under plain attention, on the policy itself."""
    view, pad, device = forward.view, forward.pad, forward.device
    rows = _telling(view.sizes)
    examples = [shortened(view.example(row), LEAK_TOKENS[device.type == "cuda"]) for row in rows]
    groups = view.sizes.group[rows].tolist()
    packed = forward.logprobs(forward.arrived(forward.staged(examples, groups)))
    plain = []
    for kernel in ("sdpa", "eager"):
        with attention.plain_attention(forward.engine.module.model, kernel):
            plain.append([forward.logprobs(collate([one], [0], pad, None).to(device))[0] for one in examples])
    attention.refuse_difference(packed, plain[0], plain[1], forward.settings, work.policy)


def _telling(sizes: Sizes) -> list[int]:
    """Rows on which a leak would show: two long ones that share a prompt, as far as there are, and one that does not.

    Long, since a kernel works by blocks of tokens, and may be right within one and wrong across two.
    """
    order = np.lexsort((-sizes.completion, sizes.group))  # by group, the longest first
    group = sizes.group[order]
    firsts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    seconds = firsts[(firsts + 1 < len(order)) & (group[np.minimum(firsts + 1, len(order) - 1)] == group[firsts])] + 1
    if len(seconds):
        second = seconds[sizes.completion[order[seconds]].argmax()]
        shared = [int(order[second - 1]), int(order[second])]
    else:
        shared = [int(sizes.completion.argmax())]
    others = np.flatnonzero(sizes.group != sizes.group[shared[0]])
    return [*shared, int(others[sizes.completion[others].argmax()])] if len(others) else shared


def _measure(forward: Forward, work: Round) -> dict[str, Any]:
    """Compares trainer and behaviour policy on the data's tokens under the frozen policy.

    Raises WorkError where the mean is past a bound of the recipe: the loss would regress on the difference. A ratio of
    single tokens feels it in nats a token; a residual, which sums over a completion, in units of reward.
    """
    rows = forward.view.newest()
    rows = rows[:: max(1, len(rows) // GAP_ROWS)]
    gaps = insight.Gap(forward.device), insight.Gap(forward.device)
    with forward.steps([rows.tolist()]) as steps:
        for part, taken in (laid for step in steps for laid in step.passes):
            batch = forward.scored(taken)
            if part and forward.team.leads:
                gaps[0].add(batch.logprobs, batch.behaviour, batch.mask)
                gaps[1].add(batch.logprobs, batch.sampled, batch.mask)
    behaviour, sampled = (gap.over_ranks() for gap in gaps)
    settings = forward.settings
    residual = settings.beta2 * behaviour["sequence_mean"] if settings.loss == "oapl" else None
    refuse_gap(behaviour["mean"], residual, settings, work.data.root)
    found: dict[str, Any] = {
        "logprob_gap": behaviour,
        "residual_gap": residual,
        "attention": forward.attention,
    }
    if settings.behaviour == "recomputed":
        # Null where the engine said nothing.
        found["engine_gap"] = sampled if sampled["tokens"] else None
    return found


def refuse_gap(token: float, residual: float | None, settings: Learning, data: Path) -> None:
    """Raises WorkError where the mean gap is past a bound: `token` in nats, `residual` (oapl) in units of reward."""
    bounds = settings.max_logprob_gap, settings.max_residual_gap
    cure = "train the policy that wrote the data, or let the trainer recompute with learning.behaviour=recomputed"
    if not abs(token) <= bounds[0]:  # NaN is past every bound
        raise WorkError(
            f"{data}: engine and trainer disagree by {token:+.4f} nats a token, more "
            f"than learning.max_logprob_gap={bounds[0]}; {cure}"
        )
    if residual is not None and bounds[1] is not None and not abs(residual) <= bounds[1]:
        raise WorkError(
            f"{data}: engine and trainer disagree by {residual / settings.beta2:+.4g} nats a completion, which is "
            f"{residual:+.4f} of a reward in each residual (x learning.beta2={settings.beta2:g}), more than "
            f"learning.max_residual_gap={bounds[1]}; {cure}"
        )
