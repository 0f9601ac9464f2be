"""LoRA through peft: adapters are trained, the policy's own weights are not, and a snapshot holds both merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RequestError
from pipeline.policies.tensors import Stored
from trainer import wholes

NAME = "default"
FACTORS = (f"lora_A.{NAME}.weight", f"lora_B.{NAME}.weight")
"""An adapter's weights below its module."""


def add(model: Any, rank: int, alpha: int) -> None:
    """Puts an adapter on each linear layer but the output's, and freezes everything else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RequestError("learning.lora_rank needs the package peft: pip install 'oapl[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def fill(model: Any, values: Mapping[str, Stored]) -> None:
    """Sets the adapters to stored ones, before they are shared out among ranks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(wholes.as_tensor(values[name]))


def adapted(model: Any) -> dict[str, Any]:
    """The modules that have an adapter, by the name that their weight has in a snapshot."""
    return {f"{path}.weight": module for path, module in model.named_modules() if hasattr(module, "lora_A")}


def snapshot_name(name: str) -> str:
    """What a weight of the policy's own is called in a snapshot, where its module has an adapter around it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def factors(module: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """An adapter's A [rank, inputs] and B [outputs, rank]."""
    return module.lora_A[NAME].weight, module.lora_B[NAME].weight


def delta(module: Any, a: Tensor, b: Tensor) -> Tensor:
    """What an adapter with these factors adds to its module's weight, float32. [outputs, inputs]"""
    return (b.float() @ a.float()) * float(module.scaling[NAME])
