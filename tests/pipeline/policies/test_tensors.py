"""Safetensors a tensor at a time: the bytes that the library writes, shards that the field's readers find."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.policies.tensors import Planned, Writer, stored
from trainer.wholes import DTYPES, as_bytes, as_tensor

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).bfloat16(),
    "a.weight": torch.tensor([[-1.5, float("inf")]]).bfloat16(),
    "empty": torch.zeros(0, 7).bfloat16(),
    "ä": torch.tensor(2.0).bfloat16(),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> dict[str, str]:
    plan = [Planned(name, DTYPES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
    writer = Writer(folder, "model", plan, **options)
    for name, value in sorted(tensors.items()):
        writer.write(name, as_bytes(value))
    writer.close()
    return writer.hashes


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    hashes = write(tmp_path, TENSORS)
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, TENSORS[name])
    assert hashes == {"model.safetensors": sha256(ours).hexdigest()}
    assert ours == theirs


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    mixed = {**TENSORS, "count": torch.tensor([3, -4]), "exact": torch.randn(5, dtype=torch.float64)}
    write(tmp_path, mixed)
    found = stored(tmp_path)
    assert found.keys() == mixed.keys()
    for name, value in mixed.items():
        assert torch.equal(as_tensor(found[name]), value)
        assert as_tensor(found[name]).dtype == value.dtype


def test_shards_hold_what_they_may_and_are_found_by_their_index(tmp_path: Path) -> None:
    many = {f"layer.{number}": torch.full((10,), float(number)) for number in range(5)}  # 40 bytes each
    many["layer.large"] = torch.ones(50)
    hashes = write(tmp_path, many, shard_bytes=100)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert {name: sha256((tmp_path / name).read_bytes()).hexdigest() for name in hashes} == hashes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 5 * 40 + 200
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], many[name])
    assert stored(tmp_path, "model").keys() == many.keys()


def test_nothing_is_left_out_or_swapped(tmp_path: Path) -> None:
    plan = [Planned("a", "F32", (1,)), Planned("b", "F32", (1,))]
    with pytest.raises(AssertionError, match="was next"):
        Writer(tmp_path, "model", plan).write("b", b"1234")
    writer = Writer(tmp_path, "model", plan)
    writer.write("a", b"1234")
    with pytest.raises(AssertionError, match="not all"):
        writer.close()
