"""LoRA: adapters learn, the policy's own weights stay, and the snapshot is both merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from learning_parts import Learned, Made, folder_hash, plain_logprobs
from safetensors.torch import load_file

from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


def test_a_merged_snapshot_is_an_ordinary_policy(
    learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path
) -> None:
    """Same names and shapes as its parent; each linear layer moved by a matrix of low rank, nothing else moved."""
    before, parent = folder_hash(policy), load_file(policy / "model.safetensors")
    learned = learn_here(dataset.place, recipe(lora_rank=2, learning_rate=0.02))
    weights = learned.weights()
    assert {name: value.shape for name, value in weights.items()} == {n: v.shape for n, v in parent.items()}
    for name, value in weights.items():
        if "_proj" in name:
            singular = torch.linalg.svdvals((value - parent[name]).double())
            assert singular[0] > 1e-5
            assert (singular[2:] < 1e-5 * singular[0] + 1e-7).all(), name
        else:
            assert torch.equal(value, parent[name]), name
    assert folder_hash(policy) == before


def test_what_is_published_is_what_learned(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    """One more round measures its first log-probabilities on the merged weights: the last ones of the adapters."""
    from transformers import AutoModelForCausalLM

    rows = learn_here(dataset.place, recipe(epochs=1)).summary["sequences"]
    learned = learn_here(dataset.place, recipe(lora_rank=2, learning_rate=0.02, batch_size=rows, epochs=1))
    wanted = recipe(lora_rank=2, learning_rate=0.02, batch_size=rows, epochs=2)
    second = learn_here(dataset.place, wanted).log[1]
    model = AutoModelForCausalLM.from_pretrained(learned.snapshot, dtype=torch.float64, attn_implementation="eager")
    surprise, tokens = 0.0, 0
    with torch.no_grad():
        for group in dataset.groups():
            if len({reward for _, reward in group}) > 1:
                for row, _ in group:
                    found = plain_logprobs(model, row.prompt_tokens, row.completion_tokens, dataset.temperature)
                    surprise -= found.sum().item()
                    tokens += len(found)
    assert abs(second["surprise"] - surprise / tokens) < 1e-5


def test_under_zero_3_the_same(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    plain = learn_here(dataset.place, recipe(lora_rank=2))
    sharded = learn_here(dataset.place, recipe(lora_rank=2, zero_stage=3))
    for name, value in plain.weights().items():
        torch.testing.assert_close(value, sharded.weights()[name], rtol=0, atol=2e-5)
