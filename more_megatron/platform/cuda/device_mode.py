"""Sends tensors that are asked for on a GPU to the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from more_megatron.platform.stand_in import Table

__all__ = ["BACKWARD_IN_MODE", "CpuInPlaceOfCuda", "enter_for_good"]

BACKWARD_IN_MODE = Table()


def _on_cpu(device: Any) -> Any:
    """Return the CPU for a CUDA device in any of its spellings, anything else as it is."""
    is_cuda = (
        (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
        or (isinstance(device, int) and not isinstance(device, bool))
    )
    return torch.device("cpu") if is_cuda else device


class CpuInPlaceOfCuda(TorchFunctionMode):
    """While active, `device='cuda'` and its other spellings mean the CPU.

    Megatron names the device in a hundred places (`device='cuda'`, `device=torch.cuda.current_device()`); a mode
    catches them all where a tensor is made or moved.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


_MODE = CpuInPlaceOfCuda()


# PyTorch takes a mode off while it handles a function, and `torch.autograd.backward` is such a function.
@BACKWARD_IN_MODE.surrounds(
    "torch.autograd",
    "_engine_run_backward",
    why="what a backward pass calls, recomputation above all, would run without the device mode",
    text="torch.autograd.backward(",
    file="core/tensor_parallel/random.py",
)
def _run_backward_in_mode(former: Any, *args: Any, **kwargs: Any) -> Any:
    with _MODE:
        return former(*args, **kwargs)


def enter_for_good() -> None:
    """Make the mode active in this thread until the process ends."""
    _MODE.__enter__()
