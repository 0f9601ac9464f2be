"""The policy under DeepSpeed: how it is configured, started, kept and read out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import RequestError
from pipeline.policies.snapshots import MOMENTS, SHARING
from pipeline.recipe import Learning, Recipe
from pipeline.storage import durable
from trainer import adapters, sequence
from trainer.attention import register
from trainer.logprobs import with_entropy
from trainer.packing import Layout
from trainer.passes import Pass
from trainer.policy import load_policy
from trainer.sequence import ALONE, Share, Team


class Scored(torch.nn.Module):
    """A causal language model that answers with log-probabilities of given tokens, so logits stay inside."""

    def __init__(self, model: Any, temperature: float, team: Team = ALONE) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.team = team
        self.entropy = torch.zeros(2)
        """Of the policy in the last pass: see `sampled_entropy`."""

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        layout: Layout | None,
        sources: torch.Tensor,
        targets: torch.Tensor,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tensors of a `passes.Pass` -> log-probabilities [completion tokens], float32.

        Packed, a team's ranks each compute their share of the stream; each of them gets all log-probabilities.
        """
        if layout is None or positions is None:
            # No mask: padding is on the right and attention is causal.
            return self._logprobs(ids, sources, targets)
        if self.team.size == 1:
            return self._logprobs(ids, sources, targets, position_ids=positions, layout=layout)
        share = Share(self.team, ids.shape[1])
        if own is None:  # the pass was laid out for one rank; a card is waited for here
            own = share.holds(sources)
        told = {"position_ids": share.of(positions), "layout": layout, "share": share}
        found = self._logprobs(share.of(ids), sources[own] - share.first, targets[own], **told)
        return sequence.joined(found, own, len(sources), self.team)

    def _logprobs(self, ids: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, **told: Any) -> torch.Tensor:
        hidden = self.model.base_model(input_ids=ids, use_cache=False, **told).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, sources)
        head = self.model.get_output_embeddings()
        logprobs, self.entropy = with_entropy(head, chosen, targets, self.temperature)
        return logprobs


def score(engine: Any, taken: Pass) -> torch.Tensor:
    """log pi of each completion token, zero outside of the mask: [sequences, longest completion]."""
    chosen = engine(taken.ids, taken.positions, taken.layout, taken.sources, taken.targets, taken.own)
    # By places that are known: with a mask, the backward pass would wait for the card to count it.
    empty = torch.zeros(taken.mask.numel(), dtype=torch.float32, device=taken.mask.device)
    return empty.index_copy(0, taken.cells, chosen.float()).view(taken.mask.shape)


def deepspeed_config(settings: Learning) -> dict[str, Any]:
    """What DeepSpeed is told. Accumulation is set by hand at each step, since its count follows the lengths."""
    # Without ZeRO, DeepSpeed would train bfloat16 weights themselves; from stage 1 on there are float32 master weights.
    stage = max(settings.zero_stage, 1) if settings.dtype == "bfloat16" else settings.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_optimization": zero,
        # PyTorch's Adam serves on the host, too; DeepSpeed's needs a C++ compiler at first use.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": [settings.adam_beta1, settings.adam_beta2],
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
                # PyTorch's own Adam needs no compiler; on a GPU DeepSpeed's fused one is compiled at first use.
                "torch_adam": not torch.cuda.is_available() or settings.offload != "none",
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def start(recipe: Recipe, policy: Path, temperature: float, team: Team) -> Any:
    """The policy in a DeepSpeed engine, in training mode. Each rank calls it.

    Raises RequestError where the policy computes something that the learner would not.
    """
    import deepspeed

    torch.manual_seed(recipe.seed)
    settings = recipe.learning
    attention = register(settings.attention) if settings.packing else settings.attention
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model = load_policy(policy, dtype, attention)
    _refuse_scaled_logits(model.config, policy)
    sequence.refuse_uneven_heads(model.config.get_text_config().num_attention_heads, team, policy)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora_rank:
        adapters.add(model, settings.lora_rank, settings.lora_alpha)
    model.train()
    scored = Scored(model, temperature, team)
    engine, *_ = deepspeed.initialize(
        model=scored,
        model_parameters=[p for p in scored.parameters() if p.requires_grad],
        config=deepspeed_config(settings),
    )
    return engine


def _refuse_scaled_logits(config: Any, policy: Path) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RequestError(
                f"{policy}: its logits are scaled ({name}), which the learner does not compute; use another"
            )


def gathered(engine: Any, settings: Learning) -> dict[str, torch.Tensor]:
    """The model's whole weights, adapters merged, on the host of rank 0; under ZeRO-3 they are gathered one by one."""
    model = engine.module.model
    if settings.lora_rank:
        return adapters.merged(model, partitioned=settings.zero_stage == 3)
    if settings.zero_stage < 3:
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def _sharing(settings: Learning) -> dict[str, Any]:
    """What must be the same for DeepSpeed to read back what it wrote."""
    return {"ranks": dist.get_world_size(), "zero_stage": settings.zero_stage, "dtype": settings.dtype}


def load_moments(engine: Any, out: Path, snapshot_id: str, settings: Learning) -> bool:
    """Goes on with the moments that were kept with the snapshot; False where there are none.

    Snapshot and moments were written together, master weights among them; loading them changes no weight. Raises
    RequestError where they were shared among the ranks in another way.
    """
    folder = out / MOMENTS / snapshot_id
    if not settings.keep_optimizer or settings.lora_rank or not folder.is_dir():
        return False
    record = folder / SHARING
    kept = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if kept != _sharing(settings):
        raise RequestError(
            f"{folder}: kept under {kept}, not {_sharing(settings)}; learn with those settings, "
            "or start moments anew with learning.keep_optimizer=false"
        )
    engine.load_checkpoint(str(folder.parent), tag=snapshot_id, load_lr_scheduler_states=False)
    return True


def keep_moments(engine: Any, out: Path, snapshot_id: str, parent: str, settings: Learning) -> None:
    """Keeps the optimizer's state for the next round, whole or not at all; older ones than the parent's are deleted."""
    if not settings.keep_optimizer or settings.lora_rank:
        return
    folder = out / MOMENTS
    save_state(engine, folder, ".partial", settings)
    if dist.get_rank() == 0:
        (folder / ".partial" / SHARING).write_text(json.dumps(_sharing(settings)), encoding="utf-8")
        shutil.rmtree(folder / snapshot_id, ignore_errors=True)
        (folder / ".partial").rename(folder / snapshot_id)
        for old in folder.iterdir():
            if old.is_dir() and old.name not in (snapshot_id, parent):
                shutil.rmtree(old)
    dist.barrier()


def save_state(engine: Any, folder: Path, tag: str, settings: Learning) -> None:
    """DeepSpeed's checkpoint of weights and optimizer, on the disk when this returns. Each rank calls it."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=bool(settings.lora_rank))
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (folder / tag).iterdir():
            durable.sync_file(path)
        durable.sync_folder(folder / tag)
