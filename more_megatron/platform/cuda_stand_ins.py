"""Stand-ins for `torch.cuda` on a machine without a GPU.

Megatron calls `torch.cuda` on every training path: for streams, events, the random state and the current device. Each
entry of `TORCH_CUDA` says which call that is and what takes its place. `torch.cuda.is_available` is left alone: it goes
on saying that there is no GPU.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from more_megatron.platform.stand_in import StandIn

__all__ = ["NO_COMPILER", "TORCH_CUDA"]

# Ampere's: old enough that nothing takes a Blackwell path, new enough for Megatron's own minimum.
_COMPUTE_CAPABILITY = (8, 0)


class HostStream:
    """A CUDA stream on a machine where every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Return `event`, or a new one, recorded now."""
        event = event or HostEvent()
        event.record()
        return event

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""

    def query(self) -> bool:
        """Return True: all work is done."""
        return True


class HostEvent:
    """A CUDA event that remembers the time of the clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        """Remember the present time."""
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Return the milliseconds from this event to `end`."""
        return (end._recorded_at - self._recorded_at) * 1e3


_HOST_STREAM = HostStream()


@contextlib.contextmanager
def _stream_context(stream: Any = None) -> Iterator[None]:
    yield


def _uncompiled(model: Any = None, **options: Any) -> Any:
    return model if model is not None else lambda function: function


# Two functions, not one: torch.compile keeps a rule for each function object it finds in torch.cuda.
def _set_device(device: Any) -> None:
    return None


def _synchronize(device: Any = None) -> None:
    return None


def _device_properties(device: Any = None) -> SimpleNamespace:
    major, minor = _COMPUTE_CAPABILITY
    return SimpleNamespace(name="CPU", major=major, minor=minor, multi_processor_count=1, total_memory=0)


def _memory_stats(device: Any = None) -> dict[str, int]:
    """Return the memory of this process, in bytes, under the names of CUDA's allocator."""
    used = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = {"allocation.all.current": 0}
    for kind in ("allocated", "reserved"):
        stats[f"{kind}_bytes.all.current"] = used
        stats[f"{kind}_bytes.all.peak"] = max(peak, used)
    return stats


# torch.manual_seed seeds CUDA as well and would come back here, hence the generator itself.
def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)


def _cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


_TENSOR_TYPE = torch.Tensor.type


def _type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:  # Under the device mode the original calls back here, hence the check.
        name = _TENSOR_TYPE(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
    return _TENSOR_TYPE(self, dtype, *args, **kwargs)


def _torch_cuda(name: str, replacement: Any, reason: str, file: str, text: str | None = None) -> StandIn:
    return StandIn("torch.cuda", name, replacement, reason, file, text or f"torch.cuda.{name}(")


NO_COMPILER = (
    StandIn(
        "torch",
        "compile",
        _uncompiled,
        "disabled here, it would still import the compiler with each decorator: seconds at every start",
        "core/jit.py",
        "jit_fuser = torch.compile",
    ),
)

TORCH_CUDA = (
    _torch_cuda(
        "current_device",
        lambda: 0,
        "device of new tensors; the device mode sends it to the CPU",
        "core/tensor_parallel/layers.py",
    ),
    _torch_cuda(
        "device_count",
        lambda: 1,
        "with none, model-parallel groups and random states are not set up",
        "training/initialize.py",
    ),
    _torch_cuda("set_device", _set_device, "each rank picks its GPU", "training/initialize.py"),
    _torch_cuda("synchronize", _synchronize, "timers and pipeline sends wait for the GPU", "core/timers.py"),
    _torch_cuda(
        "Stream", HostStream, "side streams for copies and reductions", "core/transformer/moe/token_dispatcher.py"
    ),
    _torch_cuda("Event", HostEvent, "events order the side streams", "core/transformer/moe/moe_layer.py"),
    _torch_cuda(
        "stream", _stream_context, "work is sent to a side stream", "core/distributed/param_and_grad_buffer.py"
    ),
    _torch_cuda(
        "current_stream",
        lambda device=None: _HOST_STREAM,
        "side streams wait for the main one",
        "core/distributed/param_and_grad_buffer.py",
    ),
    _torch_cuda(
        "manual_seed",
        _manual_seed,
        "parameters and dropout are drawn from the GPU's generator",
        "core/tensor_parallel/random.py",
    ),
    _torch_cuda(
        "get_rng_state",
        _get_rng_state,
        "checkpoints and tracked random states hold the GPU's",
        "core/tensor_parallel/random.py",
    ),
    _torch_cuda("set_rng_state", _set_rng_state, "checkpoints restore the GPU's", "training/checkpointing.py"),
    _torch_cuda(
        "get_device_properties",
        _device_properties,
        "the architecture decides which flags are legal",
        "training/utils/common_utils.py",
    ),
    _torch_cuda(
        "get_device_capability",
        lambda device=None: _COMPUTE_CAPABILITY,
        "grouped GEMM asks for the architecture",
        "training/arguments.py",
    ),
    _torch_cuda(
        "memory_stats",
        _memory_stats,
        "memory reports read the GPU's allocator; here they say what the process uses",
        "training/training.py",
    ),
    StandIn(
        "torch.cuda.memory",
        "memory_stats",
        _memory_stats,
        "as above, for memory_allocated and its kin",
        "training/utils/common_utils.py",
        "torch.cuda.memory_allocated()",
    ),
    StandIn(
        "torch:Tensor",
        "cuda",
        _cuda,
        "batches and the loss scale are moved to the GPU",
        "core/optimizer/grad_scaler.py",
        ".cuda(torch.cuda.current_device())",
    ),
    StandIn(
        "torch:Tensor",
        "type",
        _type,
        "the optimizer and gradient clipping compare type names",
        "core/optimizer/clip_grads.py",
        "== 'torch.cuda.FloatTensor'",
    ),
)
