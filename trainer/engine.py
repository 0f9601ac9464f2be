"""The policy under DeepSpeed: how it is configured, started, kept and read out again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import RequestError
from pipeline.recipe import Learning, Recipe
from pipeline.storage import durable
from trainer import adapters, sequence
from trainer.attention import chosen, register
from trainer.kept import MASTER, Kept
from trainer.loading import load_shared
from trainer.logprobs import with_entropy
from trainer.packing import Layout
from trainer.passes import Pass
from trainer.policy import load_policy
from trainer.ranks import wait
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
    half = settings.dtype == "bfloat16"
    stage = max(settings.zero_stage, 1) if half else settings.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_optimization": zero,
        # torch's AdamW serves on the host, too; DeepSpeed's needs a C++ compiler at first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": half},
        # Gradients of many passes are added up, and reduced over ranks, in float32: in bfloat16 the sum stops growing
        # where an addend is below a 256th of it.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    if settings.optimizer == "deepspeed":
        told["optimizer"] = {"type": "AdamW", "params": {**_adam(settings), "torch_adam": False}}
    return told


def _adam(settings: Learning) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": [settings.adam_beta1, settings.adam_beta2],
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }


def _fused_adam(settings: Learning) -> Callable[[Any], torch.optim.Optimizer]:
    """torch's AdamW in one kernel, on cards and on the host: compiled already, where DeepSpeed's are at first use."""
    return lambda parameters: torch.optim.AdamW(parameters, **_adam(settings), fused=True)


def start(recipe: Recipe, policy: Path, temperature: float, team: Team, kept: Kept | None = None) -> Any:
    """The policy in a DeepSpeed engine, in training mode, with what was kept beside it. Each rank calls it.

    Raises RequestError where the policy computes something that the learner would not.
    """
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    torch.manual_seed(recipe.seed)
    settings = recipe.learning
    attention = register(chosen(settings)) if settings.packing else chosen(settings)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    config = deepspeed_config(settings)
    weights = kept.base if kept is not None and kept.base is not None else policy
    if settings.zero_stage == 3:
        model = load_shared(weights, dtype, attention, config)
    else:
        model = load_policy(weights, dtype, attention)
    _refuse_scaled_logits(model.config, policy)
    sequence.refuse_uneven_heads(model.config.get_text_config().num_attention_heads, team, policy)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora_rank:
        adapters.add(model, settings.lora_rank, settings.lora_alpha)
        if kept is not None:
            adapters.fill(model, kept.tensors(MASTER))
    model.train()
    bf16_optimizer.see_memory_usage = _say_nothing
    scored = Scored(model, temperature, team)
    engine, *_ = deepspeed.initialize(
        model=scored,
        model_parameters=[p for p in scored.parameters() if p.requires_grad],
        optimizer=None if settings.optimizer == "deepspeed" else _fused_adam(settings),
        config=config,
    )
    return engine


def _say_nothing(*_: Any, **__: Any) -> None:
    """In place of what DeepSpeed prints of memory, unasked, wherever a bfloat16 policy starts."""


def _refuse_scaled_logits(config: Any, policy: Path) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise RequestError(
                f"{policy}: its logits are scaled ({name}), which the learner does not compute; use another"
            )


def save_state(engine: Any, folder: Path, tag: str, settings: Learning) -> None:
    """DeepSpeed's checkpoint of weights and optimizer, on the disk when this returns. Each rank calls it."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)
    wait()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=bool(settings.lora_rank))
    wait()
    if dist.get_rank() == 0:
        for path in (folder / tag).iterdir():
            durable.sync_file(path)
        durable.sync_folder(folder / tag)
