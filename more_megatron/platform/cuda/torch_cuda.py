"""Stand-ins for `torch.cuda` on a machine without a GPU.

Megatron calls `torch.cuda` on every training path: for streams, events, the random state and the current device. Each
entry of `TORCH_CUDA` says which call that is and what takes its place. `torch.cuda.is_available` is left alone: it goes
on saying that there is no GPU.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from more_megatron.platform.stand_in import Table

__all__ = ["NO_COMPILER", "TORCH_CUDA"]

NO_COMPILER, TORCH_CUDA = Table(), Table()
# Ampere's: old enough that nothing takes a Blackwell path, new enough for Megatron's own minimum.
_COMPUTE_CAPABILITY = (8, 0)


def _torch_cuda(name: str, reason: str, file: str) -> Callable[[Any], Any]:
    return TORCH_CUDA.replaces(f"torch.cuda:{name}", why=reason, text=f"torch.cuda.{name}(", file=file)


@NO_COMPILER.replaces(
    "torch:compile",
    why="disabled here, it would still import the compiler with each decorator: seconds at every start",
    text="jit_fuser = torch.compile",
    file="core/jit.py",
)
def _uncompiled(model: Any = None, **options: Any) -> Any:
    return model if model is not None else lambda function: function


class _Done:
    """What CUDA lets one wait for, on a machine where every operation has finished when it returns."""

    def wait(self, other: Any = None) -> None:
        """Return at once: there is nothing to wait for."""

    synchronize = wait_stream = wait_event = wait

    def query(self) -> bool:
        """Return True: all work is done."""
        return True


@_torch_cuda("Event", "events order the side streams", "core/transformer/moe/moe_layer.py")
class HostEvent(_Done):
    """A CUDA event that remembers the time of the clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record()

    def record(self, stream: Any = None) -> None:
        """Remember the present time."""
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Return the milliseconds from this event to `end`."""
        return (end._recorded_at - self._recorded_at) * 1e3


@_torch_cuda("Stream", "side streams for copies and reductions", "core/transformer/moe/token_dispatcher.py")
class HostStream(_Done):
    """A CUDA stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Return `event`, or a new one, recorded now."""
        event = event or HostEvent()
        event.record()
        return event


_HOST_STREAM = HostStream()


@_torch_cuda("current_stream", "side streams wait for the main one", "core/distributed/param_and_grad_buffer.py")
def _current_stream(device: Any = None) -> HostStream:
    return _HOST_STREAM


@_torch_cuda("stream", "work is sent to a side stream", "core/distributed/param_and_grad_buffer.py")
@contextlib.contextmanager
def _stream_context(stream: Any = None) -> Iterator[None]:
    yield


@_torch_cuda(
    "current_device", "device of new tensors; the device mode sends it to the CPU", "core/tensor_parallel/layers.py"
)
def _current_device() -> int:
    return 0


@_torch_cuda(
    "device_count", "with none, model-parallel groups and random states are not set up", "training/initialize.py"
)
def _device_count() -> int:
    return 1


# Two functions, not one: torch.compile keeps a rule for each function object it finds in torch.cuda.
@_torch_cuda("set_device", "each rank picks its GPU", "training/initialize.py")
def _set_device(device: Any) -> None:
    return None


@_torch_cuda("synchronize", "timers and pipeline sends wait for the GPU", "core/timers.py")
def _synchronize(device: Any = None) -> None:
    return None


@_torch_cuda("get_device_capability", "grouped GEMM asks for the architecture", "training/arguments.py")
def _device_capability(device: Any = None) -> tuple[int, int]:
    return _COMPUTE_CAPABILITY


@_torch_cuda(
    "get_device_properties", "the architecture decides which flags are legal", "training/utils/common_utils.py"
)
def _device_properties(device: Any = None) -> SimpleNamespace:
    major, minor = _COMPUTE_CAPABILITY
    return SimpleNamespace(name="CPU", major=major, minor=minor, multi_processor_count=1, total_memory=0)


@_torch_cuda(
    "memory_stats",
    "memory reports read the GPU's allocator; here they say what the process uses",
    "training/training.py",
)
@TORCH_CUDA.replaces(
    "torch.cuda.memory:memory_stats",
    why="as above, for memory_allocated and its kin",
    text="torch.cuda.memory_allocated()",
    file="training/utils/common_utils.py",
)
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
@_torch_cuda(
    "manual_seed", "parameters and dropout are drawn from the GPU's generator", "core/tensor_parallel/random.py"
)
def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


@_torch_cuda("get_rng_state", "checkpoints and tracked random states hold the GPU's", "core/tensor_parallel/random.py")
def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


@_torch_cuda("set_rng_state", "checkpoints restore the GPU's", "training/checkpointing.py")
def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)


@TORCH_CUDA.replaces(
    "torch:Tensor.cuda",
    why="batches and the loss scale are moved to the GPU",
    text=".cuda(torch.cuda.current_device())",
    file="core/optimizer/grad_scaler.py",
)
def _cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


@TORCH_CUDA.surrounds(
    "torch:Tensor.type",
    why="the optimizer and gradient clipping compare type names",
    text="== 'torch.cuda.FloatTensor'",
    file="core/optimizer/clip_grads.py",
)
def _type(former: Any, self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:  # Under the device mode the original calls back here, hence the check.
        name = former(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
    return former(self, dtype, *args, **kwargs)
