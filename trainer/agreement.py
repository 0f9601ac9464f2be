"""Do engine and trainer agree on the frozen policy? Measured before anything is learned, on the data itself.

Here, too, log-probabilities are recomputed where the recipe asks for that, and a packed pass is held against its
sequences one by one.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import RequestError, WorkError
from pipeline.policies.snapshots import Snapshot
from trainer import attention, insight, reference
from trainer.forward import Forward
from trainer.passes import collate, shortened
from trainer.work import UNKNOWN, Round

GAP_ROWS = 256
"""Completions on which engine and trainer are compared before learning."""


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
    rows = sorted({0, min(1, len(view) - 1), len(view) - 1})
    examples = [shortened(view.example(row), 48) for row in rows]
    groups = view.sizes.group[rows].tolist()
    packed = forward.logprobs(collate(examples, groups, pad, forward.attention).to(device))
    with attention.plain_attention(forward.engine.module.model):
        alone = [forward.logprobs(collate([one], [0], pad, None).to(device))[0] for one in examples]
    attention.refuse_difference(packed, alone, forward.settings, work.policy)


def _measure(forward: Forward, work: Round) -> dict[str, Any]:
    """Compares trainer and behaviour policy on the data's tokens under the frozen policy, in nats a token.

    Raises WorkError where the mean is past the recipe's bound: the loss would regress on the difference.
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
    bound = forward.settings.max_logprob_gap
    if not abs(behaviour["mean"]) <= bound:  # NaN is past every bound
        raise WorkError(
            f"{work.data.root}: engine and trainer disagree by {behaviour['mean']:+.4f} nats a token, more "
            f"than learning.max_logprob_gap={bound}; train the policy that wrote the "
            "data, or let the trainer recompute with learning.behaviour=recomputed"
        )
    found: dict[str, Any] = {"logprob_gap": behaviour}
    if forward.settings.behaviour == "recomputed":
        # Null where the engine said nothing.
        found["engine_gap"] = sampled if sampled["tokens"] else None
    return found
