"""Operations that would make the host wait for a card fail, so that a new one is found on a CPU."""

from __future__ import annotations

import re
import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim,
    aten._unique2, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
"""Those whose result, or its shape, the host needs: `item`, `tolist`, `float`, `if tensor`, and what counts a mask."""
INDEXED = {aten.index, aten.index_put, aten.index_put_}
"""These count a mask, and take places as they are."""


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    def __init__(self, padded: bool = False) -> None:
        """`padded`: transformers makes the mask of such a pass, and looks whether its positions are of one sequence."""
        super().__init__()
        self.padded = padded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in INDEXED and any(part is not None and part.dtype == torch.bool for part in args[1])
        counted = packet is aten.repeat_interleave and not isinstance(args[0], torch.Tensor)
        if by_mask or (packet in WAITING and not counted):
            stack = traceback.extract_stack()
            callers = [
                frame.filename for frame in stack if "/torch/" not in frame.filename and frame.filename != __file__
            ]
            # What DeepSpeed itself waits for, as ZeRO-3 does where ranks compare their first traces, is not ours.
            ours = not re.search(r"/deepspeed/(runtime|utils|comm)/", callers[-1])
            if ours and not (self.padded and callers[-1].endswith("transformers/masking_utils.py")):
                raise Waited(f"{func} waits for the device:\n{''.join(traceback.format_list(stack[-12:]))}")
        return func(*args, **(kwargs or {}))


def in_passes(learner: Any) -> None:
    """Holds the passes of `trainer.learner` to it, from now on."""
    plain = learner._Learner._pass

    def guarded(self: Any, taken: Any, *told: Any) -> Any:
        with NoWaiting(padded=taken.layout is None):
            return plain(self, taken, *told)

    learner._Learner._pass = guarded
