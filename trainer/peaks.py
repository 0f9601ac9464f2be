"""The arithmetic that a machine could do at most: what a share of it, the MFU, is a share of."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peak:
    flops: float
    """Operations a second of one device."""
    source: str


SHEETS: tuple[tuple[str, str, float, float, float], ...] = (
    (r"\bB200\b", "B200, HGX B200 data sheet", 2250, 1125, 75),
    (r"\bG?H200\b(?! NVL)", "H200 SXM, H200 data sheet", 989.5, 494.5, 67),
    (r"\bH100 PCIe\b", "H100 PCIe, H100 data sheet", 756.5, 378, 51),
    (r"\bH100\b(?! NVL)", "H100 SXM, H100 data sheet", 989.5, 494.5, 67),
    (r"\bA100\b", "A100, A100 data sheet", 312, 156, 19.5),
    (r"\bA10\b", "A10, A10 data sheet", 125, 62.5, 31.2),
    (r"\bL40S\b", "L40S, L40S data sheet", 362, 183, 91.6),
    (r"\bL4\b", "L4, L4 data sheet", 121, 60, 30.3),
    (r"\bRTX 4090$", "RTX 4090, Ada architecture whitepaper, sums in float32", 165.2, 82.6, 82.6),
    (r"\bRTX 3090$", "RTX 3090, GA102 architecture whitepaper, sums in float32", 71, 35.6, 35.6),
    (r"\bMI300X\b", "MI300X, MI300X data sheet", 1307.4, 653.7, 163.4),
)
"""What CUDA or ROCm calls the device; its name and who says so; dense tera-operations a second in bfloat16, TF32 and
float32. Data sheets give the first two with sparsity, twice as many. Laptops' cards and others whose names go on are
not meant; what is not here is measured."""


def peak(device: torch.device, dtype: str) -> Peak:
    """Of one device in the dtype that is computed in: by its data sheet, else measured on it, on a CPU in float32."""
    if device.type == "cpu":
        return Peak(matmul_flops(device, torch.float32), "measured: a float32 product of 1024 x 1024 on the CPU")
    return of_card(torch.cuda.get_device_name(device), dtype) or _measured(device, dtype)


def of_card(name: str, dtype: str) -> Peak | None:
    """By data sheet; null where there is none of that name. float32 may be computed in TF32, which PyTorch knows."""
    unit = "tf32" if dtype == "float32" and torch.get_float32_matmul_precision() != "highest" else dtype
    place = {"bfloat16": 0, "tf32": 1, "float32": 2}[unit]
    if "MIG" in name:  # a slice of one
        return None
    for pattern, told, *numbers in SHEETS:
        if re.search(pattern, name):
            return Peak(numbers[place] * TERA, f"{told}; dense, {unit}")
    return None


def _measured(device: torch.device, dtype: str) -> Peak:
    flops = matmul_flops(device, getattr(torch, dtype), size=8192)
    name = torch.cuda.get_device_name(device)
    return Peak(flops, f"measured: a {dtype} product of 8192 x 8192 on {name}, of which no data sheet is known")


def matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int = 1024, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations a second that a matrix product of this size reaches here, the best of five."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = clock()
        (left @ right)[0, 0].item()
        best = min(best, clock() - started)
    return 2 * size**3 / best
