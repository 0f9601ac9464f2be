"""One round of learning: stored rollouts in, the next snapshot out."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import RequestError, WorkError
from pipeline.policies import snapshots
from pipeline.policies.weights import MOST_ROUNDED
from pipeline.progress import Progress
from trainer import agreement, batches, checkpoints, dealing, insight, kept, trial, writing
from trainer.forward import Forward, Step
from trainer.losses import EXTRA, LOSSES, Settings, diagnostics
from trainer.passes import Pass
from trainer.ranks import from_rank_0
from trainer.schedule import learning_rate
from trainer.view import View
from trainer.work import Round, refuse_foreign_tokens, refuse_missing_packages, replayed


def learn(work: Round) -> dict[str, Any]:
    """Learns one round and publishes the snapshot; returns the summary that is written beside the log.

    Each rank calls it. Goes on from the round's checkpoint where there is one of the same data, settings and policy.
    Raises RequestError or WorkError with one line, before anything is published.
    """
    started = time.monotonic()
    settings = work.recipe.learning
    refuse_missing_packages(settings)
    parent = snapshots.load_record(work.policy)
    view = from_rank_0(lambda: View([work.data, *replayed(work)], settings))
    refuse_foreign_tokens(parent, view, work)
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
        **learner.speed.told(),
        "planned_memory_gib": insight.planned_memory(work.recipe, work.policy, learner.ranks),
        "resumed_at": learner.resumed_at,
        "seconds": round(time.monotonic() - started, 2),
    }
    if dist.get_rank() == 0:
        work.log.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    checkpoints.delete(work.checkpoints)
    return summary


def rehearse(work: Round) -> None:
    """Learns as `learn` does and publishes nothing: what is wrong is said before there is data. Each rank calls it."""
    settings = work.recipe.learning
    refuse_missing_packages(settings)
    learner = _Learner(work, from_rank_0(lambda: View([work.data], settings)), snapshots.load_record(work.policy))
    learner.prepare()
    learner.run()


class _Learner:
    def __init__(self, work: Round, view: View, parent: snapshots.Snapshot) -> None:
        self.work, self.view, self.parent = work, view, parent
        self.behaviour = snapshots.load_record(work.behaviour) if work.behaviour else parent
        """The snapshot that engine and trainer are compared on, and that is recomputed."""
        self.settings = work.recipe.learning
        self.forward = Forward(work, view)
        self.forward.start(work.behaviour or work.policy, self.behaviour)
        self.loss_settings = Settings(**{name: getattr(self.settings, name) for name in Settings.__slots__})
        self.names = (*SUMS, *EXTRA[self.settings.loss])
        self.ranks = dist.get_world_size()
        self.planned = batches.steps_of(len(view), self.settings)
        self.steps = self.tokens = 0
        self.resumed_at: int | None = None
        self.facts: dict[str, Any] = {}
        """What was found before the first step; goes into the summary."""
        self.speed = insight.Speed(self.forward.device, self.settings.dtype, self.ranks)
        vocabulary = self.engine.module.model.config.vocab_size
        if view.largest_token >= vocabulary:
            raise RequestError(
                f"{work.data.root}: has token {view.largest_token}, and {work.policy} knows {vocabulary} tokens; "
                "train the policy that made the data, or one with its tokenizer"
            )

    @property
    def engine(self) -> Any:
        return self.forward.engine

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
            "learning": self.settings.model_dump(mode="json", exclude=APART),
        }

    def prepare(self) -> None:
        """What comes before the first step, or, where a checkpoint of this very round is there, instead of it."""
        trial.longest_pass(self.forward)
        lagging = self.behaviour.sha256 != self.parent.sha256
        if lagging:
            self._compare()
            self.forward.start(self.work.policy, self.parent)
        state = checkpoints.load(self.engine, self.work.checkpoints, self._identity(), self.settings)
        if state is not None:
            self.steps, self.tokens, self.facts = state["steps"], state["tokens"], state["facts"]
            self.resumed_at = self.parent.step + self.steps
            if not lagging:
                agreement.attach_references(self.forward, self.work, self.behaviour, compute=False)
            return
        if self.forward.kept is not None:
            kept.take_up(self.engine, self.forward.kept, self.settings)
        else:
            kept.take_up_earlier(self.engine, self.work.out, self.parent.snapshot_id, self.settings)
        if not lagging:
            self._compare()

    def _compare(self) -> None:
        self.facts = agreement.compare(self.forward, self.work, self.behaviour)

    def run(self) -> None:
        """The round's optimizer steps that are still to be done."""
        first = self.parent.step
        log = insight.Log(self.work.log, self.settings.tensorboard, range(first + 1, first + self.steps + 1))
        progress = Progress("learn", self.planned - self.steps, "steps") if dist.get_rank() == 0 else None
        order = batches.global_batches(self.view, self.settings, self.work.recipe.seed + self.work.number)
        every = self.settings.checkpoint_every
        with self.forward.steps(itertools.islice(order, self.steps, None)) as steps:
            started = time.monotonic()
            for step in steps:
                record = self._step(step, started)
                log.add(record)
                if progress is not None:
                    progress.add(1, tokens=int(record["tokens"]), note=f"loss {record['loss']:.4f}")
                if every and self.steps % every == 0:
                    state = {"steps": self.steps, "tokens": self.tokens, "facts": self.facts}
                    checkpoints.save(self.engine, self.work.checkpoints, self._identity(), state, self.settings)
                started = time.monotonic()
        log.close()
        if progress is not None:
            progress.close()

    def _step(self, step: Step, started: float) -> dict[str, float]:
        """One optimizer step. The host waits for the device at its end alone, and runs ahead of it until then."""
        rate = learning_rate(self.settings, self.work.number, self.steps, self.planned, self.parent.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.forward.device)
        norm = None
        last = len(step.plan[self.forward.team.number]) - 1
        for number, (part, taken) in enumerate(step.passes):
            self.engine.set_gradient_accumulation_boundary(number == last)
            # Mean over the global batch: DeepSpeed averages gradients over ranks, so each rank's share is scaled up.
            # The ranks of a team each have the gradient of their own positions, which is such a share as well.
            sums += self._pass(taken, self.ranks / len(step.rows) if part else 0.0)
            if number == last:
                norm = self._plain_norm()
            self.engine.step()
        if self.ranks > 1:
            dist.all_reduce(sums)
        self.steps += 1
        told = dict(zip(self.names, sums.tolist(), strict=True))
        told["norm"] = float(self.engine.get_global_grad_norm() or (0.0 if norm is None else norm))
        return self._record(told, step, rate, time.monotonic() - started)

    def _pass(self, taken: Pass, scale: float) -> torch.Tensor:
        """Forward and backward of a pass; returns what it adds to the sums. `scale`: 0 where it only fills up."""
        scored = self.forward.scored(taken)
        losses, metrics = LOSSES[self.settings.loss](scored, self.loss_settings)
        self.engine.backward(losses.sum() * scale)
        found: dict[str, torch.Tensor] = {}
        if scale:
            # Each rank of a team has the entropy of its own share; the rest is the same on all of them.
            found = dict(zip(("entropy", "entropy_tokens"), self.engine.module.entropy, strict=True))
            if self.forward.team.leads:
                found |= {"loss": losses.detach().sum(), **diagnostics(scored), **metrics}
        zero = torch.zeros((), device=self.forward.device)
        return torch.stack([found.get(name, zero).double() for name in self.names])

    def _plain_norm(self) -> torch.Tensor | None:
        """Gradient norm before clipping where DeepSpeed keeps none: without ZeRO, in float32."""
        if self.engine.zero_optimization() or self.settings.dtype != "float32":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.parameters() if p.grad is not None])

    def _record(self, sums: dict[str, float], taken: Step, rate: float, seconds: float) -> dict[str, float]:
        count, norm = len(taken.rows), sums["norm"]
        loss = sums["loss"] / count
        step = self.parent.step + self.steps
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise WorkError(
                f"learning stopped at step {step}: loss {loss}, gradient norm {norm}; nothing was published. "
                "Lower learning.learning_rate or raise learning.beta2"
            )
        # All ranks know all passes, so what these are is counted on the host, and nothing of it is sent.
        sizes, snapshot_steps = self.view.sizes, self.view.snapshot_step[taken.rows]
        amount = dealing.amount([part for share in taken.plan for part in share], sizes)
        tokens, useful = amount.targets, sizes.useful(taken.rows)
        flops = self.forward.arithmetic.of(amount.positions, tokens, amount.pairs)
        self.tokens += tokens
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
            "lag": step - float(snapshot_steps.mean()),
            "lag_max": step - int(snapshot_steps.min()),
            "tokens": float(tokens),
            # Positions computed that belong to no sequence, and those that a shared prompt saved.
            "padding": max(0.0, 1 - useful / amount.computed),
            "shared": max(0.0, 1 - amount.computed / useful),
            **self.speed.step(tokens, flops, seconds),
            "seconds": round(seconds, 4),
        }

    def publish(self) -> snapshots.Snapshot:
        """Writes the next snapshot. Raises WorkError, publishing nothing, where a weight is not finite."""
        step = self.parent.step + self.steps
        chosen, survival = writing.publish(self.engine, self.work, self.parent, self.forward.kept, step)
        self.facts["update_norm"], self.facts["rounded_away"] = survival.update**0.5, survival.share_lost
        if survival.share_lost > MOST_ROUNDED and dist.get_rank() == 0:
            sys.stderr.write(
                f"{chosen}: {survival.share_lost:.0%} of what was learned is below {self.settings.dtype}'s resolution "
                "and not in the snapshot; float32 weights are kept beside it, and a round in this folder goes on from "
                "them\n"
            )
        return snapshots.load_record(self.work.out / chosen)


APART = {"checkpoint_every", "tensorboard", "launcher", "hosts"}
"""Settings that no weight hangs on."""
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
)
"""What a step adds up over forward passes and ranks, on the device, in sums over sequences or tokens."""
