"""Weights and optimizer state that ranks share, one whole tensor at a time, whatever the ZeRO stage.

All functions that take an engine are called by each rank, in the same order: the parts travel between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from pipeline.policies.tensors import Stored

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, under the names that torch gives them."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
"""What safetensors calls them."""
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of what safetensors calls so."""
    return _TORCH[name]


def parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """By name; a tied weight once, under its first name. The same on all ranks."""
    return sorted(model.named_parameters())


def shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole, which a rank may hold a part of."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def master(parameter: Tensor) -> Tensor:
    """The whole weight: in float32 where it is learned, as the optimizer has it; as it is where it is frozen."""
    if not hasattr(parameter, "ds_id") or hasattr(parameter, "_z3_optimizer"):
        found: Tensor | None = safe_get_full_fp32_param(parameter)
        if found is not None:
            return found
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def moment(engine: Any, parameter: torch.nn.Parameter, key: str) -> Tensor:
    """The whole of one of `MOMENTS`, float32."""
    found: Tensor | None = safe_get_full_optimizer_state(parameter, key)
    return engine.optimizer.state[parameter][key] if found is None else found


def steps_taken(engine: Any) -> int:
    """Optimizer steps that Adam's bias correction has counted."""
    return max((int(state["step"]) for state in _adam(engine).state.values() if "step" in state), default=0)


def put_master(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Sets the optimizer's float32 weight to a whole tensor; the weight that is computed with stays what it is."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def put_moment(engine: Any, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
    """Sets one of `MOMENTS` to a whole tensor, after `make_moments`."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_optimizer_state(parameter, value, key)
    else:
        engine.optimizer.state[parameter][key].copy_(value)


def make_moments(engine: Any, steps: int) -> None:
    """Adam's state as it is after so many steps, its moments zero: torch makes them in its first step only."""
    adam = _adam(engine)
    for flat in _flats(engine):
        on = flat.device if adam.defaults.get("fused") else torch.device("cpu")
        taken = torch.tensor(float(steps), device=on) if isinstance(adam, torch.optim.AdamW) else steps
        adam.state[flat] = {"step": taken, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # lets ZeRO 1 and 2 find them by weight


def not_finite(model: Any) -> str | None:
    """The first weight that has an infinity or a NaN in this rank's part; looked for where the weights are."""
    named = parameters(model)
    fine = [torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all() for _, parameter in named]
    told = torch.stack([one.to(fine[0].device) for one in fine]).tolist()
    return next((name for (name, _), ok in zip(named, told, strict=True) if not ok), None)


def as_tensor(stored: Stored) -> Tensor:
    """A stored tensor, whose bytes are read when it is used."""
    data = stored.data
    if not data:
        return torch.empty(stored.shape, dtype=_TORCH[stored.dtype])
    return torch.frombuffer(data, dtype=torch.uint8).view(_TORCH[stored.dtype]).reshape(stored.shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor on the host, little endian."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _adam(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flats(engine: Any) -> Iterator[Tensor]:
    """What Adam steps: this rank's flat float32 parts under ZeRO, else the weights."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 that accumulates in float32
            yield from getattr(engine.optimizer, name)
            return
    for group in _adam(engine).param_groups:
        yield from group["params"]


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """Of a whole, what this rank keeps under ZeRO-3; zeros where the last rank's part is filled up."""
    size = parameter.ds_tensor.numel()
    first = size * dist.get_rank()
    part = torch.zeros(size, dtype=torch.float32)
    own = value.flatten()[first : first + size]
    part[: own.numel()] = own
    return part
