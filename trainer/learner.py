"""One round of learning: stored rollouts in, the next snapshot out."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import snapshots
from pipeline.errors import RequestError, WorkError
from pipeline.progress import Progress
from pipeline.recipe import Learning, Recipe
from pipeline.rollouts.locate import Located
from trainer import batches
from trainer.batches import Padded, View
from trainer.logprobs import token_logprobs
from trainer.losses import LOSSES, Batch, Settings, diagnostics
from trainer.policy import load_policy, load_tokenizer, save_policy

GAP_ROWS = 256
"""Completions on which engine and trainer are compared before learning."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of learning is asked to do."""

    recipe: Recipe
    data: Located
    policy: Path
    out: Path
    log: Path
    """JSON lines, one an optimizer step; the summary goes beside it as .json."""
    number: int


class Scored(torch.nn.Module):
    """A causal language model that answers with log-probabilities of given tokens, so logits stay inside."""

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, ids: torch.Tensor, selected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """ids [sequences, tokens], selected [sequences, tokens], targets [chosen] -> log-probabilities [chosen]."""
        # Padding is on the right and attention is causal: no mask is needed, and the fast kernels take none.
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return token_logprobs(self.model.get_output_embeddings(), hidden[selected], targets, self.temperature)


def learn(work: Round) -> dict[str, Any]:
    """Learns one round and publishes the snapshot; returns the summary that is written beside the log.

    Each rank calls it. Raises RequestError or WorkError with one line, before anything is published.
    """
    started = time.monotonic()
    settings = work.recipe.learning
    parent = snapshots.load_record(work.policy)
    view = View(work.data, settings)
    _refuse_foreign_tokens(parent, view, work)
    engine = _start_engine(work, parent)
    learner = _Learner(work, view, engine, parent)
    gap = learner.measure_gap()
    learner.run()
    snapshot = learner.publish()
    summary = {
        "snapshot_id": snapshot.snapshot_id,
        "parent": parent.snapshot_id,
        "round": work.number,
        "step": snapshot.step,
        "steps": learner.steps,
        "dataset": view.manifest.digest,
        "sequences": len(view),
        "left_over": max(0, len(view) * settings.epochs - learner.steps * settings.batch_size),
        **{key: value for key, value in asdict(view.counts).items() if key != "reward_sum"},
        "reward_mean": view.counts.reward_sum / max(1, view.counts.rows - view.counts.unscorable_rows),
        "tokens": learner.tokens,
        "logprob_gap": gap,
        "seconds": round(time.monotonic() - started, 2),
    }
    if _rank() == 0:
        work.log.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _refuse_foreign_tokens(parent: snapshots.Snapshot, view: View, work: Round) -> None:
    data = view.manifest.provenance.tokenizer_sha256
    if data and data != parent.tokenizer_sha256:
        raise RequestError(
            f"{work.policy}: its tokenizer ({parent.tokenizer_sha256[:8]}) is not the one that wrote "
            f"{work.data.root} ({data[:8]}); train the policy that made the data, or one with its tokenizer"
        )


def deepspeed_config(settings: Learning, ranks: int) -> dict[str, Any]:
    """What DeepSpeed is told. Accumulation is set by hand at each step, since its count follows the lengths."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": [settings.adam_beta1, settings.adam_beta2],
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
                # PyTorch's own Adam needs no compiler; on a GPU DeepSpeed's fused one is compiled at first use.
                "torch_adam": not torch.cuda.is_available(),
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _start_engine(work: Round, parent: snapshots.Snapshot) -> Any:
    import deepspeed

    torch.manual_seed(work.recipe.seed)
    settings = work.recipe.learning
    model = load_policy(work.policy, torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32)
    _refuse_scaled_logits(model.config, work.policy)
    model.train()
    scored = Scored(model, _temperature(work))
    engine, *_ = deepspeed.initialize(
        model=scored,
        model_parameters=[p for p in scored.parameters() if p.requires_grad],
        config=deepspeed_config(settings, dist.get_world_size()),
    )
    kept = optimizer_folder(work.out)
    if settings.keep_optimizer and (kept / parent.snapshot_id).is_dir():
        # The snapshot's weights and this state were written together; loading both gives bit-equal weights.
        engine.load_checkpoint(str(kept), tag=parent.snapshot_id, load_lr_scheduler_states=False)
    return engine


def _temperature(work: Round) -> float:
    from pipeline.rollouts.store import read_manifest

    return float(read_manifest(work.data.rollouts).provenance.sampling.get("temperature", 1.0))


def _refuse_scaled_logits(config: Any, policy: Path) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RequestError(
                f"{policy}: its logits are scaled ({name}), which the learner does not compute; use another"
            )


def optimizer_folder(out: Path) -> Path:
    """Where Adam's moments lie between rounds, one folder a snapshot; only the newest is kept."""
    return out / ".optimizer"


class _Learner:
    def __init__(self, work: Round, view: View, engine: Any, parent: snapshots.Snapshot) -> None:
        self.work, self.view, self.engine, self.parent = work, view, engine, parent
        self.settings = work.recipe.learning
        self.device = engine.device
        self.ranks = dist.get_world_size()
        self.pad = load_tokenizer(work.policy).pad_token_id or 0
        self.planned = batches.steps_of(len(view), self.settings)
        self.steps = 0
        self.tokens = 0

    # Each rank computes the same plan from the same index, so nothing needs to be sent.
    def _plan(self, rows: Sequence[int]) -> list[list[int]]:
        """This rank's forward passes. All ranks get equally many: collectives in them must pair up."""
        lengths = self.view.lengths
        shares = batches.split_over_ranks(rows, lambda row: int(lengths[row]), self.ranks)
        budget = self.settings.micro_batch_tokens
        plans = [batches.micro_batches(share, lambda row: int(lengths[row]), budget) for share in shares]
        passes = max(len(plan) for plan in plans)
        mine = plans[_rank()]
        return mine + [[]] * (passes - len(mine))

    def _collated(self, rows: Sequence[int]) -> Padded:
        examples = [self.view.example(row) for row in rows or [0]]
        padded = batches.collate(examples, self.pad)
        return Padded(**{name: getattr(padded, name).to(self.device) for name in Padded.__slots__})

    def _forward(self, padded: Padded) -> Batch:
        chosen = self.engine(padded.ids, padded.selected, padded.targets)  # [completion tokens]
        logprobs = torch.zeros(padded.mask.shape, dtype=torch.float32, device=self.device)
        return Batch(
            logprobs.masked_scatter(padded.mask, chosen.float()), padded.behaviour, padded.mask, padded.advantage
        )

    def measure_gap(self) -> dict[str, float]:
        """Trainer's minus engine's log-probability of the data's tokens under the frozen policy, nats.

        Raises WorkError where the mean is past the recipe's bound: the loss would regress on the difference.
        """
        stride = max(1, len(self.view) // GAP_ROWS)
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        worst = torch.zeros((), device=self.device)
        self.engine.eval()
        with torch.no_grad():
            for rows in self._plan(range(0, len(self.view), stride)):
                batch = self._forward(self._collated(rows))
                if rows:
                    gap = (batch.logprobs - batch.behaviour).masked_fill(~batch.mask, 0.0)
                    total += torch.stack([gap.sum(), gap.abs().sum(), batch.mask.sum()])
                    worst = torch.maximum(worst, gap.abs().max())
        self.engine.train()
        if self.ranks > 1:
            dist.all_reduce(total)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        summed, summed_abs, tokens = total.tolist()
        mean = summed / tokens
        if not abs(mean) <= self.settings.max_logprob_gap:  # NaN is past every bound
            raise WorkError(
                f"{self.work.data.root}: engine and trainer disagree by {mean:+.4f} nats a token, more than "
                f"learning.max_logprob_gap={self.settings.max_logprob_gap}; train the policy that wrote the data, "
                "or let the trainer recompute with learning.behaviour=recomputed"
            )
        return {"mean": mean, "mean_abs": summed_abs / tokens, "max_abs": worst.item(), "tokens": tokens}

    def run(self) -> None:
        self.work.log.parent.mkdir(parents=True, exist_ok=True)
        progress = Progress("learn", self.planned, "steps") if _rank() == 0 else None
        with self.work.log.open("w", encoding="utf-8") as log:
            for rows in batches.global_batches(self.view, self.settings, self.work.recipe.seed + self.work.number):
                record = self._step(rows)
                if _rank() == 0:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                if progress is not None:
                    progress.add(1, tokens=int(record["tokens"]), note=f"loss {record['loss']:.4f}")
        if progress is not None:
            progress.close()

    def _step(self, rows: list[int]) -> dict[str, float]:
        started = time.monotonic()
        rate = self._learning_rate()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        plan = self._plan(rows)
        for number, micro in enumerate(plan):
            self.engine.set_gradient_accumulation_boundary(number == len(plan) - 1)
            padded = self._collated(micro)
            batch = self._forward(padded)
            losses, metrics = LOSSES[self.settings.loss](batch, Settings(self.settings.beta2))
            # Mean over the global batch: DeepSpeed averages gradients over ranks, so each rank's share is scaled up.
            self.engine.backward(losses.sum() * (self.ranks / len(rows) if micro else 0.0))
            if number == len(plan) - 1:
                norm = self._plain_norm()
            self.engine.step()
            if micro:
                positions = padded.ids.new_tensor([padded.ids.numel(), int(self.view.lengths[micro].sum())])
                metrics |= {"loss": losses.detach().sum(), "tokens": batch.mask.sum(), **diagnostics(batch)}
                metrics |= {"positions": positions[0], "unpadded": positions[1]}
                sums += torch.stack([metrics[name].double() for name in SUMS])
        if self.ranks > 1:
            dist.all_reduce(sums)
        self.steps += 1
        norm = float(self.engine.get_global_grad_norm() or norm)
        return self._record(dict(zip(SUMS, sums.tolist(), strict=True)), rows, rate, norm, time.monotonic() - started)

    def _plain_norm(self) -> float:
        """Gradient norm before clipping where DeepSpeed keeps none: without ZeRO, in float32."""
        if self.engine.zero_optimization() or self.settings.dtype != "float32":
            return 0.0
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.parameters() if p.grad is not None]).item()

    def _learning_rate(self) -> float:
        s = self.settings
        horizon = s.horizon_rounds or 1
        done = self.steps / self.planned + (self.work.number if s.horizon_rounds else 0)
        left = max(0.0, 1.0 - done / horizon)
        floor = s.final_learning_rate
        factor = {
            "constant": 1.0,
            "linear": floor + (1 - floor) * left,
            "cosine": floor + (1 - floor) * 0.5 * (1 - math.cos(math.pi * left)),
        }[s.schedule]
        warm = min(1.0, (self.parent.step + self.steps + 1) / s.warmup_steps) if s.warmup_steps else 1.0
        return s.learning_rate * factor * warm

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
            "residual_abs": sums["residual_abs"] / count,
            "log_ratio": sums["log_ratio"] / count,
            "log_ratio_abs": sums["log_ratio_abs"] / count,
            "kl_k1": sums["kl_k1"] / tokens,
            "kl_k3": sums["kl_k3"] / tokens,
            "surprise": sums["surprise"] / tokens,
            "advantage_abs": sums["advantage_abs"] / count,
            "grad_norm": norm,
            "learning_rate": rate,
            "lag": step - self.view.example(rows[0]).snapshot_step,
            "tokens": tokens,
            "padding": 1 - sums["unpadded"] / sums["positions"],
            "seconds": round(seconds, 4),
        }

    def publish(self) -> snapshots.Snapshot:
        """Writes the next snapshot. Raises WorkError, publishing nothing, where a weight is not finite."""
        state = _gathered(self.engine)
        for name, weight in state.items():
            if not torch.isfinite(weight).all():
                raise WorkError(f"learning made {name} non-finite; nothing was published. Lower learning.learning_rate")
        step = self.parent.step + self.steps
        model = self.engine.module.model

        def fill(folder: Path) -> None:
            save_policy(model, self.work.policy, folder, state)

        chosen: list[Any] = [None]
        if _rank() == 0:
            published = snapshots.publish(
                self.work.out,
                fill,
                parent=self.parent.snapshot_id,
                round=self.work.number,
                step=step,
                recipe_sha256=self.work.recipe.digest(),
            )
            chosen = [published.snapshot_id]
        if self.ranks > 1:
            dist.broadcast_object_list(chosen)
        if self.settings.keep_optimizer:
            self._keep_optimizer(chosen[0])
        return snapshots.load_record(self.work.out / chosen[0])

    def _keep_optimizer(self, snapshot_id: str) -> None:
        folder = optimizer_folder(self.work.out)
        self.engine.save_checkpoint(str(folder), tag=snapshot_id, save_latest=False)
        if _rank() == 0:
            for old in folder.iterdir():
                if old.is_dir() and old.name not in (snapshot_id, self.parent.snapshot_id):
                    shutil.rmtree(old)


SUMS = (
    "loss",
    "residual_abs",
    "log_ratio",
    "log_ratio_abs",
    "kl_k1",
    "kl_k3",
    "surprise",
    "advantage_abs",
    "tokens",
    "positions",
    "unpadded",
)
"""What a step adds up over forward passes and ranks, in sums over sequences or tokens."""


def _gathered(engine: Any) -> dict[str, torch.Tensor]:
    """The model's whole weights, on the host of rank 0; under ZeRO-3 they are gathered one by one."""
    model = engine.module.model
    if engine.zero_optimization_stage() < 3:
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if _rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
