"""Weights are looked at in their bytes; torch's own safetensors writer makes them here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.policies.weights import compare


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_weight_is_found_in_each_format(tmp_path: Path, kind: torch.dtype, bad: float) -> None:
    largest = torch.full((3000,), torch.finfo(kind).max, dtype=kind)  # the neighbour of infinity is finite
    spoilt = largest.clone()
    spoilt[1777] = bad
    old, new = write(tmp_path / "a", one=largest, two=largest), write(tmp_path / "b", one=largest, two=spoilt)
    assert compare(old, old).not_finite == []
    found = compare(new, old)
    assert found.not_finite == ["two"] and found.changed == 1 and found.tensors == 2


def test_a_tensor_that_only_one_has_counts_as_changed(tmp_path: Path) -> None:
    weights = torch.arange(10.0)
    old, new = write(tmp_path / "a", one=weights), write(tmp_path / "b", one=weights, other=weights)
    assert compare(new, old).changed == 1


def test_the_smallest_change_is_seen_across_blocks(tmp_path: Path) -> None:
    weights = torch.zeros(3_000_000)  # 12 MB: three blocks
    moved = weights.clone()
    moved[-1] = 1e-45
    assert compare(write(tmp_path / "b", one=moved), write(tmp_path / "a", one=weights)).changed == 1
