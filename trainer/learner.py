"""One round of learning: stored rollouts in, the next snapshot out."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline import snapshots
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.layout import Run
from pipeline.progress import Progress
from pipeline.recipe import Learning, Recipe
from pipeline.rollouts.locate import Located, locate
from pipeline.rollouts.store import Manifest
from trainer import batches, checkpoints, insight, packing, reference, sequence
from trainer import engine as engines
from trainer.batches import Pass, View
from trainer.losses import EXTRA, LOSSES, Batch, Settings, diagnostics
from trainer.policy import load_tokenizer, save_policy
from trainer.schedule import learning_rate

GAP_ROWS = 256
"""Completions on which engine and trainer are compared before learning."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of learning is asked to do."""

    recipe: Recipe
    data: Located
    policy: Path
    """What learning goes on from."""
    out: Path
    log: Path
    """JSON lines, one an optimizer step; the summary goes beside it as .json."""
    number: int
    behaviour: Path | None = None
    """The snapshot that wrote the newest data, where it is not `policy`, which learned further meanwhile."""

    @property
    def run(self) -> Run | None:
        """The run that the data is a round of, if it is."""
        if self.data.round is None:
            return None
        root = self.data.root.absolute()
        return Run(root.parent.parent, root.name) if root.parent.name == "runs" else None

    @property
    def checkpoints(self) -> Path:
        return self.run.checkpoints(self.number) if self.run else self.out / ".checkpoints"

    def reference(self, place: Located, manifest: Manifest) -> Path:
        """Where a dataset's recomputed log-probabilities are kept."""
        if self.run is not None and place.round is not None:
            return self.run.reference(place.round)
        return self.out / ".reference" / manifest.digest[:16]


def learn(work: Round) -> dict[str, Any]:
    """Learns one round and publishes the snapshot; returns the summary that is written beside the log.

    Each rank calls it. Goes on from the round's checkpoint where there is one of the same data, settings and policy.
    Raises RequestError or WorkError with one line, before anything is published.
    """
    started = time.monotonic()
    settings = work.recipe.learning
    _refuse_missing_packages(settings)
    parent = snapshots.load_record(work.policy)
    view = from_rank_0(lambda: View([work.data, *_replayed(work)], settings))
    _refuse_foreign_tokens(parent, view, work)
    learner = _Learner(work, view, parent)
    learner.prepare()
    learner.run()
    snapshot = learner.publish()
    summary = {
        "snapshot_id": snapshot.snapshot_id,
        "parent": parent.snapshot_id,
        "round": work.number,
        "step": snapshot.step,
        "steps": learner.steps,
        "loss": settings.loss,
        "dataset": view.manifests[0].digest,
        "sequences": len(view),
        "left_over": max(0, len(view) * settings.epochs - learner.steps * settings.batch_size),
        **{key: value for key, value in asdict(view.counts).items() if key != "reward_sum"},
        "reward_mean": view.counts.reward_sum / max(1, view.counts.rows - view.counts.unscorable_rows),
        "tokens": learner.tokens,
        **learner.facts,
        "resumed_at": learner.resumed_at,
        "seconds": round(time.monotonic() - started, 2),
    }
    if dist.get_rank() == 0:
        work.log.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    checkpoints.delete(work.checkpoints)
    return summary


Made = TypeVar("Made")


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank, or the OaplError that it raised. Each rank calls it."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except OaplError as error:  # the other ranks wait for the answer
            made = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(made)
    if isinstance(made[0], OaplError):
        raise made[0]
    found: Made = made[0]
    return found


def _replayed(work: Round) -> list[Located]:
    """The rounds before this one that are learned from again, newest first."""
    wanted = work.recipe.learning.replay_rounds
    if not wanted:
        return []
    if work.data.round is None:
        raise RequestError(f"{work.data.root}: learning.replay_rounds needs a run's folder, which has older rounds")
    older = range(work.data.round - 1, max(-1, work.data.round - 1 - wanted), -1)
    return [locate(work.data.root, number) for number in older]


def _refuse_missing_packages(settings: Learning) -> None:
    from importlib.util import find_spec

    if settings.tensorboard and find_spec("tensorboard") is None:
        raise RequestError("learning.tensorboard needs the package tensorboard: pip install 'oapl[tensorboard]'")
    if settings.attention == "flash" and find_spec("flash_attn") is None:
        raise RequestError("learning.attention=flash needs the package flash-attn; install it, or take sdpa")
    if settings.attention == "flash" and settings.dtype == "float32":
        raise RequestError("learning.attention=flash needs learning.dtype=bfloat16; or take sdpa")
    if settings.attention == "flex" and not torch.cuda.is_available():
        raise RequestError("learning.attention=flex has no backward pass on a CPU; take sdpa")


def _refuse_foreign_tokens(parent: snapshots.Snapshot, view: View, work: Round) -> None:
    for place, manifest in zip(view.places, view.manifests, strict=True):
        data = manifest.provenance.tokenizer_sha256
        if data not in ("", UNKNOWN, parent.tokenizer_sha256):
            raise RequestError(
                f"{work.policy}: its tokenizer ({parent.tokenizer_sha256[:8]}) is not the one that wrote "
                f"{place.root} ({data[:8]}); train the policy that made the data, or one with its tokenizer"
            )


UNKNOWN = "unknown"
"""What provenance says of imported data where its source recorded nothing."""


def _temperature(view: View, fallback: float) -> float:
    """What the data was sampled at; `fallback` for imported data that does not say.

    Raises RequestError where rounds that are learned from together differ.
    """
    told = (manifest.provenance.sampling.get("temperature", UNKNOWN) for manifest in view.manifests)
    found = {fallback if value == UNKNOWN else float(value) for value in told}
    if len(found) > 1:
        raise RequestError(
            f"{view.places[0].root}: rounds sampled at different temperatures ({', '.join(map(str, sorted(found)))}) "
            "can't be replayed together; lower learning.replay_rounds"
        )
    return found.pop()


class _Learner:
    engine: Any

    def __init__(self, work: Round, view: View, parent: snapshots.Snapshot) -> None:
        self.work, self.view, self.parent = work, view, parent
        self.behaviour = snapshots.load_record(work.behaviour) if work.behaviour else parent
        """The snapshot that engine and trainer are compared on, and that is recomputed."""
        self.settings = work.recipe.learning
        self.team = sequence.form(self.settings.sequence_parallel)
        self._start(work.behaviour or work.policy)
        self.loss_settings = Settings(**{name: getattr(self.settings, name) for name in Settings.__slots__})
        self.names = (*SUMS, *EXTRA[self.settings.loss])
        self.device = self.engine.device
        self.ranks = dist.get_world_size()
        self.pad = load_tokenizer(work.policy).pad_token_id or 0
        self.attention = self.settings.attention if self.settings.packing else None
        self.planned = batches.steps_of(len(view), self.settings)
        self.steps = self.tokens = 0
        self.resumed_at: int | None = None
        self.facts: dict[str, Any] = {}
        """What was found before the first step; goes into the summary."""
        self.work_of = insight.Work(self.engine.module.model)
        vocabulary = self.engine.module.model.config.vocab_size
        if view.largest_token >= vocabulary:
            raise RequestError(
                f"{work.data.root}: has token {view.largest_token}, and {work.policy} knows {vocabulary} tokens; "
                "train the policy that made the data, or one with its tokenizer"
            )

    def _start(self, policy: Path) -> None:
        """Takes up a policy, and lets go of the one before: two at once would not fit where one hardly does."""
        if hasattr(self, "engine"):
            self.engine.destroy()
            del self.engine
            gc.collect()
        temperature = _temperature(self.view, self.work.recipe.generation.temperature)
        self.engine = engines.start(self.work.recipe, policy, temperature, self.team)

    # Each rank computes the same plan from the same index, so nothing needs to be sent.
    def _plan(self, rows: Sequence[int]) -> list[list[int]]:
        """This rank's forward passes. All ranks get equally many: collectives in them must pair up."""
        shares = batches.split_over_ranks(rows, self.view.sizes, self.team.count)
        budget = self.settings.micro_batch_tokens * self.team.size
        plans = [batches.micro_batches(share, self.view.sizes, budget) for share in shares]
        passes = max(len(plan) for plan in plans)
        mine = plans[self.team.number]
        return mine + [[]] * (passes - len(mine))

    def _pass(self, rows: Sequence[int]) -> Pass:
        """The rows laid out; a rank that has none computes some row, and nothing is done with it."""
        rows = rows or [0]
        examples = [self.view.learnable(row) for row in rows]
        return batches.collate(examples, self.view.sizes.group[rows].tolist(), self.pad, self.attention).to(self.device)

    def _scored(self, taken: Pass) -> Batch:
        logprobs = engines.score(self.engine, taken)
        return Batch(logprobs, taken.behaviour, taken.mask, taken.advantage, taken.reward, taken.sampled)

    def _identity(self) -> dict[str, Any]:
        """All that a round's weights depend on; a checkpoint of another is not gone on with."""
        return {
            "datasets": [manifest.digest for manifest in self.view.manifests],
            "rows": len(self.view),
            "advantages": float(self.view.advantage.astype("float64").sum()),
            "policy": self.parent.sha256,
            "behaviour": self.behaviour.sha256,
            "round": self.work.number,
            "seed": self.work.recipe.seed,
            "ranks": self.ranks,
            "learning": self.settings.model_dump(mode="json", exclude={"checkpoint_every", "tensorboard"}),
        }

    def prepare(self) -> None:
        """What comes before the first step, or, where a checkpoint of this very round is there, instead of it."""
        lagging = self.behaviour.sha256 != self.parent.sha256
        if lagging:
            self._compare()
            self._start(self.work.policy)
        state = checkpoints.load(self.engine, self.work.checkpoints, self._identity(), self.settings)
        if state is not None:
            self.steps, self.tokens, self.facts = state["steps"], state["tokens"], state["facts"]
            self.resumed_at = self.parent.step + self.steps
            if not lagging:
                self._attach_references(compute=False)
            return
        engines.load_moments(self.engine, self.work.out, self.parent.snapshot_id, self.settings)
        if not lagging:
            self._compare()

    def _compare(self) -> None:
        """Holds the behaviour policy against what the engine said, and recomputes it where the recipe asks for that."""
        self.engine.eval()
        with torch.no_grad():
            if self.attention is not None:
                self._refuse_leaks()
            self._attach_references(compute=True)
            self.facts = self._measure()
        self.engine.train()

    def _attach_references(self, compute: bool) -> None:
        """Recomputed log-probabilities where the recipe asks for them: found beside the data, or computed now."""
        if self.settings.behaviour == "engine":
            return
        for place, manifest in enumerate(self.view.manifests):
            folder = self.work.reference(self.view.places[place], manifest)
            made_by = manifest.provenance.snapshot_sha256
            policy = made_by if made_by not in ("", UNKNOWN) else self.behaviour.sha256
            identity = {
                "dataset": manifest.digest,
                "policy": policy,
                "temperature": self.engine.module.temperature,
                "dtype": self.settings.dtype,
            }
            found = reference.find(folder, identity)
            if found is None:
                if policy != self.behaviour.sha256 or not compute:
                    raise RequestError(
                        f"{self.view.places[place].root}: written by snapshot {manifest.provenance.snapshot_id}, and "
                        f"{self.work.behaviour or self.work.policy} can't recompute what that one sampled; name that "
                        "snapshot as the behaviour policy, or set learning.behaviour=engine"
                    )
                blocks = [block for block in self.view.blocks if block.place == place]
                found = reference.recompute(
                    folder, identity, blocks, self.settings, self.pad, self._logprobs, self.device, self.team
                )
            self.view.attach(place, found)

    def _logprobs(self, taken: Pass) -> torch.Tensor:
        return engines.score(self.engine, taken)

    def _refuse_leaks(self) -> None:
        """Compares a packed pass with its sequences one by one, under plain attention, on the policy itself."""
        assert self.attention is not None
        rows = sorted({0, min(1, len(self.view) - 1), len(self.view) - 1})
        examples = [batches.shortened(self.view.example(row), 48) for row in rows]
        groups = self.view.sizes.group[rows].tolist()
        packed = self._logprobs(batches.collate(examples, groups, self.pad, self.attention).to(self.device))
        with packing.plain_attention(self.engine.module.model):
            alone = [self._logprobs(batches.collate([one], [0], self.pad, None).to(self.device))[0] for one in examples]
        packing.refuse_difference(packed, alone, self.settings, self.work.policy)

    def _measure(self) -> dict[str, Any]:
        """Compares trainer and behaviour policy on the data's tokens under the frozen policy, in nats a token.

        Raises WorkError where the mean is past the recipe's bound: the loss would regress on the difference.
        """
        rows = self.view.newest()
        rows = rows[:: max(1, len(rows) // GAP_ROWS)]
        gaps = insight.Gap(self.device), insight.Gap(self.device)
        for part in self._plan(rows.tolist()):
            batch = self._scored(self._pass(part))
            if part and self.team.leads:
                gaps[0].add(batch.logprobs, batch.behaviour, batch.mask)
                gaps[1].add(batch.logprobs, batch.sampled, batch.mask)
        behaviour, sampled = (gap.over_ranks() for gap in gaps)
        if not abs(behaviour["mean"]) <= self.settings.max_logprob_gap:  # NaN is past every bound
            raise WorkError(
                f"{self.work.data.root}: engine and trainer disagree by {behaviour['mean']:+.4f} nats a token, more "
                f"than learning.max_logprob_gap={self.settings.max_logprob_gap}; train the policy that wrote the "
                "data, or let the trainer recompute with learning.behaviour=recomputed"
            )
        found: dict[str, Any] = {"logprob_gap": behaviour, "matmul_flops": insight.matmul_flops(self.device)}
        if self.settings.behaviour == "recomputed":
            # Null where the engine said nothing.
            found["engine_gap"] = sampled if sampled["tokens"] else None
        return found

    def run(self) -> None:
        """The round's optimizer steps that are still to be done."""
        first = self.parent.step
        log = insight.Log(self.work.log, self.settings.tensorboard, range(first + 1, first + self.steps + 1))
        progress = Progress("learn", self.planned - self.steps, "steps") if dist.get_rank() == 0 else None
        order = batches.global_batches(self.view, self.settings, self.work.recipe.seed + self.work.number)
        done = self.steps
        every = self.settings.checkpoint_every
        for number, rows in enumerate(order):
            if number < done:
                continue
            record = self._step(rows)
            log.add(record)
            if progress is not None:
                progress.add(1, tokens=int(record["tokens"]), note=f"loss {record['loss']:.4f}")
            if every and self.steps % every == 0:
                state = {"steps": self.steps, "tokens": self.tokens, "facts": self.facts}
                checkpoints.save(self.engine, self.work.checkpoints, self._identity(), state, self.settings)
        log.close()
        if progress is not None:
            progress.close()

    def _step(self, rows: list[int]) -> dict[str, float]:
        started = time.monotonic()
        rate = learning_rate(self.settings, self.work.number, self.steps, self.planned, self.parent.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        plan = self._plan(rows)
        for number, part in enumerate(plan):
            self.engine.set_gradient_accumulation_boundary(number == len(plan) - 1)
            taken = self._pass(part)
            batch = self._scored(taken)
            losses, metrics = LOSSES[self.settings.loss](batch, self.loss_settings)
            # Mean over the global batch: DeepSpeed averages gradients over ranks, so each rank's share is scaled up.
            # The ranks of a team each have the gradient of their own positions, which is such a share as well.
            self.engine.backward(losses.sum() * (self.ranks / len(rows) if part else 0.0))
            if number == len(plan) - 1:
                norm = self._plain_norm()
            self.engine.step()
            if part:
                # Each rank of a team has the entropy of its own share; the rest is the same on all of them.
                found = dict(zip(("entropy", "entropy_tokens"), self.engine.module.entropy, strict=True))
                if self.team.leads:
                    found |= {"loss": losses.detach().sum(), "tokens": batch.mask.sum(), **diagnostics(batch)}
                    found |= metrics | self._counts(part, taken)
                zero = torch.zeros(())
                sums += torch.stack([found.get(name, zero).double().to(self.device) for name in self.names])
        if self.ranks > 1:
            dist.all_reduce(sums)
        self.steps += 1
        norm = float(self.engine.get_global_grad_norm() or norm)
        told = dict(zip(self.names, sums.tolist(), strict=True))
        return self._record(told, rows, rate, norm, time.monotonic() - started)

    def _counts(self, rows: Sequence[int], taken: Pass) -> dict[str, torch.Tensor]:
        """What a forward pass was, in numbers that need no device."""
        counts = {
            "positions": taken.ids.numel(),
            "useful": self.view.sizes.useful(rows),
            "flops": self.work_of.flops(taken),
            "snapshot_step": int(self.view.snapshot_step[rows].sum()),
        }
        return {name: torch.tensor(value) for name, value in counts.items()}

    def _plain_norm(self) -> float:
        """Gradient norm before clipping where DeepSpeed keeps none: without ZeRO, in float32."""
        if self.engine.zero_optimization() or self.settings.dtype != "float32":
            return 0.0
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.parameters() if p.grad is not None]).item()

    def _record(
        self, sums: dict[str, float], rows: list[int], rate: float, norm: float, seconds: float
    ) -> dict[str, float]:
        count = len(rows)
        loss = sums["loss"] / count
        step = self.parent.step + self.steps
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise WorkError(
                f"learning stopped at step {step}: loss {loss}, gradient norm {norm}; nothing was published. "
                "Lower learning.learning_rate or raise learning.beta2"
            )
        tokens = sums["tokens"]
        self.tokens += int(tokens)
        return {
            "step": step,
            "loss": loss,
            **{name: sums[name] / count for name in EXTRA[self.settings.loss]},
            "log_ratio": sums["log_ratio"] / count,
            "log_ratio_abs": sums["log_ratio_abs"] / count,
            "kl_k1": sums["kl_k1"] / tokens,
            "kl_k3": sums["kl_k3"] / tokens,
            "surprise": sums["surprise"] / tokens,
            "entropy": sums["entropy"] / max(1.0, sums["entropy_tokens"]),
            "advantage_abs": sums["advantage_abs"] / count,
            "grad_norm": norm,
            "learning_rate": rate,
            "lag": step - sums["snapshot_step"] / count,
            "lag_max": step - int(self.view.snapshot_step[rows].min()),
            "tokens": tokens,
            # Positions computed that belong to no sequence, and those that a shared prompt saved.
            "padding": max(0.0, 1 - sums["useful"] / sums["positions"]),
            "shared": max(0.0, 1 - sums["positions"] / sums["useful"]),
            "utilisation": sums["flops"] / seconds / (self.facts["matmul_flops"] * self.ranks),
            "seconds": round(seconds, 4),
        }

    def publish(self) -> snapshots.Snapshot:
        """Writes the next snapshot. Raises WorkError, publishing nothing, where a weight is not finite."""
        state = engines.gathered(self.engine, self.settings)
        chosen = from_rank_0(lambda: self._published(state))
        engines.keep_moments(self.engine, self.work.out, chosen, self.parent.snapshot_id, self.settings)
        return snapshots.load_record(self.work.out / chosen)

    def _published(self, state: dict[str, torch.Tensor]) -> str:
        for name, weight in state.items():
            if not torch.isfinite(weight).all():
                raise WorkError(f"learning made {name} non-finite; nothing was published. Lower learning.learning_rate")
        model = self.engine.module.model

        def fill(folder: Path) -> None:
            save_policy(model, self.work.policy, folder, state)

        return snapshots.publish(
            self.work.out,
            fill,
            parent=self.parent.snapshot_id,
            round=self.work.number,
            step=self.parent.step + self.steps,
            recipe_sha256=self.work.recipe.digest(),
        ).snapshot_id


SUMS = (
    "loss",
    "log_ratio",
    "log_ratio_abs",
    "kl_k1",
    "kl_k3",
    "surprise",
    "entropy",
    "entropy_tokens",
    "advantage_abs",
    "tokens",
    "positions",
    "useful",
    "flops",
    "snapshot_step",
)
"""What a step adds up over forward passes and ranks, in sums over sequences or tokens."""
