"""A policy that is shared out while it loads is the policy that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.recipe import Learning
from trainer import loading
from trainer.engine import deepspeed_config
from trainer.policy import load_policy


def shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded so, and in no other way."""

    def whole(*_: Any) -> None:
        raise AssertionError("transformers loaded it whole")

    monkeypatch.setattr(loading, "load_policy", whole)
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = deepspeed_config(Learning(dtype="float32", zero_stage=3))
    return loading.load_shared(folder, torch.float32, "sdpa", config)


def untied(policy: Path, folder: Path) -> Path:
    """The policy with an output matrix of its own."""
    for path in policy.iterdir():
        shutil.copy(path, folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_weights_ties_and_buffers_are_the_same(
    group_of_one: None, policy: Path, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    folder = policy if tied else untied(policy, tmp_path)
    plain = load_policy(folder)
    model = shared(folder, monkeypatch)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.ds_tensor.numel() >= theirs.numel() and ours.numel() == 0, name  # a share, and nothing besides
        with deepspeed.zero.GatheredParameters([ours]):
            assert torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not model.training


def test_a_model_with_other_names_in_its_files_is_loaded_as_transformers_does(
    group_of_one: None, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in policy.iterdir():
        shutil.copy(path, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = deepspeed_config(Learning(dtype="float32", zero_stage=3))
    model = loading.load_shared(tmp_path, torch.float32, "sdpa", config)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]), name
