"""One of the ranks that share sequences, for test_sequence.py: computes, compares and prints what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_parts import put_in_place
from learning_parts import SMALL, TEXTS
from test_packing import exact_logprobs, loss_and_gradients, our_logprobs, relative, some_examples

from pipeline.ending import leave
from trainer import sequence
from trainer.attention import register
from trainer.engine import ALONE
from trainer.policy import make_model, make_tokenizer
from trainer.sequence import Team

KEY_HEADS = {"two key heads": 2, "one key head": 1}


def policy(key_heads: int, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = make_model(SMALL.model_copy(update={"kv_heads": key_heads}), make_tokenizer(TEXTS, SMALL.vocabulary))
    model.set_attn_implementation(attention)
    return model.to(dtype).train()


def errors(key_heads: int, attention: str, loss: str, team: Team) -> dict[str, float]:
    """Relative, of loss and summed gradients, to each sequence computed alone in float64."""
    examples, groups = some_examples(150, 150)
    model = policy(key_heads, register(attention))
    scored = our_logprobs(model, examples, groups, attention, team)
    found_loss, found = loss_and_gradients(model, scored, examples, loss)
    for gradient in found.values():
        dist.all_reduce(gradient)
    exact_model = policy(key_heads, "eager", torch.float64)
    exact_loss, exact = loss_and_gradients(exact_model, exact_logprobs(exact_model, examples), examples, loss)
    return {"loss": relative(found_loss, exact_loss), "gradients": relative(found, exact)}


def kept_bytes(team: Team) -> int:
    """What a forward pass keeps for its backward pass, weights apart."""
    examples, groups = some_examples(400, 400)
    model = policy(2, register("sdpa"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        scored = our_logprobs(model, examples, groups, "sdpa", team)
    del scored
    return sum(kept.values())


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=size)
    team = sequence.form(size)
    put_in_place(pytest.MonkeyPatch())  # varlen's kernel, which is for cards
    found: dict[str, Any] = {
        f"{attention}, {loss}, {name}": errors(key_heads, attention, loss, team)
        for attention in ("sdpa", "eager", "varlen")
        for loss in ("oapl", "grpo")
        for name, key_heads in KEY_HEADS.items()
    }
    examples, groups = some_examples(3, 30)
    with torch.no_grad():
        flex = our_logprobs(policy(2, register("flex")), examples, groups, "flex", team)
        sdpa = our_logprobs(policy(2, register("sdpa")), examples, groups, "sdpa")
    found["flex"] = (flex - sdpa).abs().max().item()
    found["bytes"] = [kept_bytes(ALONE), kept_bytes(team)]
    print(json.dumps(found))
    # Both are done, and neither takes the process group down in order, which was seen to end with SIGABRT.
    dist.barrier()
    leave()


if __name__ == "__main__":
    main()
