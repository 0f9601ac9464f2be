"""The learned policy streamed out of the ranks into the next snapshot, and into what is kept beside it.

One weight after another is made whole and goes to rank 0, which casts, compares, hashes and writes it. Nobody holds
the model, and the other ranks hold nothing on their hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import OaplError, WorkError
from pipeline.policies import snapshots
from pipeline.policies.snapshots import Snapshot
from pipeline.policies.tensors import Planned, Stored, Writer, stored
from pipeline.storage.durable import told_in_one_line
from trainer import adapters, wholes
from trainer.kept import MASTER, Keeping, Kept, based_on
from trainer.kept import wanted as kept_by
from trainer.policy import save_settings
from trainer.ranks import from_rank_0, patient
from trainer.work import Round

Made = TypeVar("Made")


@dataclass(slots=True)
class Survival:
    """How much of what a round learned is left in what it published, over all weights that were learned.

    The rest was rounded away by the snapshot's dtype. It is kept for the next round, but generation never sees it.
    """

    update: float = 0.0
    """Sum of squares of trained - before."""
    lost: float = 0.0
    """Sum of squares of published - trained."""

    def add(self, before: Tensor, trained: Tensor, published: Tensor) -> None:
        """Float32 weights of one tensor."""
        self.update += (trained - before).square().sum(dtype=torch.float64).item()
        self.lost += (published - trained).square().sum(dtype=torch.float64).item()

    @property
    def share_lost(self) -> float:
        """|published - trained| / |trained - before|; 0 where nothing was learned."""
        return (self.lost / self.update) ** 0.5 if self.update else 0.0


@dataclass(frozen=True, slots=True)
class _Weight:
    """One of the snapshot's tensors, on the host of rank 0."""

    name: str
    trained: Tensor
    """Float32 where it was learned, else as it is."""
    before: Tensor | None = None
    """What learning started from, float32; null where it was not learned."""


def publish(engine: Any, work: Round, parent: Snapshot, began_with: Kept | None, step: int) -> tuple[str, Survival]:
    """Publishes the engine's policy as the snapshot after `step` steps; returns its id, and what is left of the update.

    Keeps beside it what the recipe has the next round go on with. Each rank calls it. Raises WorkError, publishing
    nothing, where a weight is not finite or the disk refuses.
    """
    _refuse_not_finite(engine)
    survival = Survival()
    weights = _weights(engine, work, began_with)

    def fill(folder: Path) -> Mapping[str, str]:
        return _fill(folder, engine.module.model, weights, work, survival)

    def write() -> str:
        return snapshots.publish(
            work.out,
            fill,
            parent=parent.snapshot_id,
            round=work.number,
            step=step,
            recipe_sha256=work.recipe.digest(),
        ).snapshot_id

    snapshot_id = _at_rank_0(weights, write, work.out)
    states = _states(engine, work)
    _at_rank_0(states, lambda: _keep(states, engine, work, parent, began_with, snapshot_id), work.out)
    return snapshot_id, from_rank_0(lambda: survival)


def _refuse_not_finite(engine: Any) -> None:
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, wholes.not_finite(engine.module.model), group=patient())
    name = next(filter(None, found), None)
    if name is not None:
        raise WorkError(f"learning made {name} non-finite; nothing was published. Lower learning.learning_rate")


def _at_rank_0(stream: Iterator[object], consume: Callable[[], Made], where: Path) -> Made:
    """What rank 0 makes of the stream, on each rank, or the OaplError that it raised.

    All ranks go through the whole stream, whatever becomes of it on rank 0: making it takes all of them.
    """
    made: Made | None = None
    problem: OaplError | None = None
    if dist.get_rank() == 0:
        try:
            with told_in_one_line(where):
                made = consume()
        except OaplError as error:
            problem = error
    for _ in stream:
        pass

    def told() -> Made:
        if problem is not None:
            raise problem
        return made  # type: ignore[return-value]

    return from_rank_0(told)


def _fill(
    folder: Path, model: Any, weights: Iterator[_Weight | None], work: Round, survival: Survival
) -> Mapping[str, str]:
    """Writes the snapshot's files; returns the hashes of those with weights."""
    planned = {plan.name: plan for plan in _plan(model)}
    whole: dict[str, Tensor] = {}
    # Where transformers renamed or fused weights when it loaded them, it knows the way back, for all of them at once.
    writer = None if getattr(model, "_weight_conversions", None) else Writer(folder, "model", list(planned.values()))
    for weight in weights:
        assert weight is not None
        published = weight.trained.to(wholes.dtype_of(planned[weight.name].dtype))
        if weight.before is not None:
            survival.add(weight.before, weight.trained, published.float())
        if writer is None:
            whole[weight.name] = published.clone()
        else:
            writer.write(weight.name, wholes.as_bytes(published))
    if writer is None:
        model.save_pretrained(folder, state_dict=whole)
    save_settings(model, work.policy, folder)
    if writer is None:
        return {}
    writer.close()
    return writer.hashes


def _plan(model: Any) -> list[Planned]:
    own = [(adapters.snapshot_name(name), value) for name, value in _own(model)]
    return [Planned(name, wholes.DTYPES[value.dtype], wholes.shape(value)) for name, value in sorted(own, key=_name)]


def _own(model: Any) -> Iterator[tuple[str, Any]]:
    """The policy's own weights and the buffers that are stored with them; a tied weight once."""
    for name, parameter in wholes.parameters(model):
        if not adapters.is_adapter(name):
            yield name, parameter
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in tied:
            yield name, value


def _name(pair: tuple[str, Any]) -> str:
    return pair[0]


def _weights(engine: Any, work: Round, began_with: Kept | None) -> Iterator[_Weight | None]:
    """The snapshot's tensors in the order of their names; nothing but on rank 0."""
    model, leads = engine.module.model, dist.get_rank() == 0
    kept = began_with.tensors(MASTER) if began_with is not None and leads else {}
    parent = stored(work.policy) if leads else {}
    adapted = adapters.adapted(model)
    for name, value in sorted(((adapters.snapshot_name(name), value) for name, value in _own(model)), key=_name):
        trained = wholes.master(value)
        if name in adapted:
            factors = [wholes.master(factor) for factor in adapters.factors(adapted[name])]
            yield _merged(name, trained, factors, adapted[name], kept) if leads else None
        elif not leads:
            yield None
        elif value.requires_grad:
            yield _Weight(name, trained.float().cpu(), _began(name, value.dtype, kept, parent))
        else:
            yield _Weight(name, trained.cpu())


def _began(name: str, dtype: torch.dtype, kept: Mapping[str, Stored], parent: Mapping[str, Stored]) -> Tensor | None:
    """The weight that learning started from, float32; null where transformers had it under another name."""
    if name in kept:
        return wholes.as_tensor(kept[name])
    return wholes.as_tensor(parent[name]).to(dtype).float() if name in parent else None


def _merged(name: str, own: Tensor, factors: list[Tensor], module: Any, kept: Mapping[str, Stored]) -> _Weight:
    """A weight with its adapter, added in float32 and rounded once, when it is published."""
    base = own.float()
    trained = base + adapters.delta(module, *factors)
    path = name.removesuffix(".weight")
    first = [kept.get(f"{path}.{factor}") for factor in adapters.FACTORS]
    before = base
    if first[0] is not None and first[1] is not None:
        before = base + adapters.delta(module, *(wholes.as_tensor(part).to(base.device) for part in first if part))
    return _Weight(name, trained.cpu(), before.cpu())


def _states(engine: Any, work: Round) -> Iterator[tuple[str, str, Tensor] | None]:
    """What is kept for the next round: (which, weight, value), in the order of the weights' names."""
    leads = dist.get_rank() == 0
    for name, parameter in wholes.parameters(engine.module.model):
        if parameter.requires_grad:
            for key in kept_by(work.recipe.learning):
                value = wholes.master(parameter) if key == MASTER else wholes.moment(engine, parameter, key)
                yield (key, name, value) if leads else None


def _keep(
    states: Iterator[tuple[str, str, Tensor] | None],
    engine: Any,
    work: Round,
    parent: Snapshot,
    began_with: Kept | None,
    snapshot_id: str,
) -> None:
    learned = [pair for pair in wholes.parameters(engine.module.model) if pair[1].requires_grad]
    keeping = Keeping(work.out, learned, work.recipe.learning)
    try:
        for state in states:
            assert state is not None
            keeping.write(*state)
        base = None
        if work.recipe.learning.lora_rank:
            base = began_with.record["base"] if began_with is not None else based_on(work.policy, parent)
        keeping.finish(snapshot_id, parent.snapshot_id, wholes.steps_taken(engine), base)
    finally:
        keeping.give_up()
