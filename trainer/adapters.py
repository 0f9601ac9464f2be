"""LoRA through peft: adapters are trained, the policy's own weights are not, and a snapshot holds both merged."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import RequestError

NAME = "default"


def add(model: Any, rank: int, alpha: int) -> None:
    """Puts an adapter on each linear layer but the output's, and freezes everything else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RequestError("learning.lora_rank needs the package peft: pip install 'oapl[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged(model: Any, partitioned: bool) -> dict[str, torch.Tensor]:
    """The weights as if the adapters had been part of them, under the names they had; `partitioned` by ZeRO-3.

    The sum is made in float32 and rounded once.
    """
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # a weight that is tied has one name in a snapshot
    for path, module in model.named_modules():
        adapted = hasattr(module, "lora_A")
        own = [module] if not adapted else [module.base_layer, module.lora_A[NAME], module.lora_B[NAME]]
        if not adapted and (".lora_" in path or path.endswith(".base_layer")):
            continue
        values = [value for part in own for value in part.parameters(recurse=False) if id(value) not in seen]
        seen |= {id(value) for value in values}
        kept = [pair for pair in own[0].named_parameters(recurse=False) if any(pair[1] is value for value in values)]
        gather = deepspeed.zero.GatheredParameters(values) if partitioned else contextlib.nullcontext()
        with gather:
            if dist.get_rank() == 0:
                for name, value in kept:
                    whole = value.detach()
                    if adapted and name == "weight":
                        whole = (whole.float() + module.get_delta_weight(NAME).detach().float()).to(whole.dtype)
                    state[f"{path}.{name}".lstrip(".")] = whole.cpu().clone()
    return state
