"""Which peak a device is held against."""

from __future__ import annotations

import pytest
import torch

from trainer import peaks


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090", "float32", 35.6),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_cards_by_their_data_sheets(name: str, dtype: str, tera: float) -> None:
    found = peaks.of_card(name, dtype)
    assert found is not None and found.flops == tera * 1e12
    assert "dense" in found.source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "Tesla T4",
    ],
)
def test_a_name_that_only_looks_alike_is_measured(name: str) -> None:
    assert peaks.of_card(name, "bfloat16") is None


def test_float32_in_tensor_cores_has_their_peak() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = peaks.of_card("NVIDIA A100-SXM4-80GB", "float32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert found is not None and found.flops == 156e12 and "tf32" in found.source


def test_a_cpu_is_measured_in_float32_and_says_so() -> None:
    found = peaks.peak(torch.device("cpu"), "bfloat16")
    assert found.flops > 1e9 and found.source.startswith("measured: a float32 product")


def test_the_measure_is_operations_by_seconds() -> None:
    ticks = iter([0.0, 2.0, 2.0, 3.0, 3.0, 7.0, 7.0, 12.0, 12.0, 13.5])
    assert peaks.matmul_flops(torch.device("cpu"), torch.float32, 64, lambda: next(ticks)) == 2 * 64**3 / 1.0
