"""A policy loaded so that each rank holds its share of the weights alone, under ZeRO-3."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from pipeline.policies.tensors import Stored, stored
from trainer import wholes
from trainer.policy import load_policy


def load_shared(folder: Path, dtype: torch.dtype, attention: str, config: dict[str, Any]) -> Any:
    """The causal language model in `folder`, shared out by `config`, DeepSpeed's of a stage 3. Each rank calls it.

    Rank 0 reads one layer's weights after another and the others get them from there, so nobody ever holds the whole
    model. Where a model's weights have other names in its files, or some of them keep a dtype of their own,
    transformers loads it as it knows to, and each rank holds all of it for a moment.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _weights_on_meta():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation=attention
        )
    files = stored(folder)
    own_dtypes = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    if own_dtypes or not dict(wholes.parameters(model)).keys() <= files.keys():
        return load_policy(folder, dtype, attention)
    _share_out(model, files, dtype, config)
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.eval()


@contextlib.contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules made meanwhile have no memory for their weights; buffers (rotary frequencies) are as always."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already is tied: it stays one
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _share_out(model: Any, files: dict[str, Stored], dtype: torch.dtype, config: dict[str, Any]) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    made: dict[int, torch.nn.Parameter] = {}  # by the empty one: a tied weight is one
    for _, block in itertools.groupby(model.named_parameters(), lambda pair: _block(pair[0])):
        holder = torch.nn.Module()
        for number, (name, empty) in enumerate(block):
            whole = torch.empty(empty.shape, dtype=dtype, device=device)
            if dist.get_rank() == 0:  # the others get it from there, while it is shared out
                whole.copy_(wholes.as_tensor(files[name]))
            made[id(empty)] = torch.nn.Parameter(whole)
            holder.register_parameter(str(number), made[id(empty)])
        # Of a block's weights together: each of them keeps all that Init was told.
        deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
    for module in model.modules():
        for key, empty in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, made[id(empty)])


def _block(name: str) -> str:
    """The layer that a weight belongs to (`model.layers.3`), or its own name where it is in none."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
