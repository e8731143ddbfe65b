"""Stand-ins for `torch.cuda` on a machine without a GPU.

Megatron calls `torch.cuda` on every training path: for streams, events, the random state and the current device. Each
entry of `TORCH_CUDA` says which call that is and what takes its place. `torch.cuda.is_available` is left alone: it goes
on saying that there is no GPU.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from more_megatron.platform.stand_in import Table

NO_COMPILER, TORCH_CUDA = Table(), Table()


def _torch_cuda(name: str, why: str, file: str) -> Callable[[Any], Any]:
    return TORCH_CUDA.replaces(f"torch.cuda:{name}", why=why, text=f"torch.cuda.{name}(", file=file)


def _answers(name: str, answer: Any, why: str, file: str) -> None:
    # Each a function of its own: torch.compile keeps a rule for every function object it finds in torch.cuda.
    _torch_cuda(name, why, file)(lambda *args, **kwargs: answer)


@NO_COMPILER.replaces(
    "torch:compile",
    why="disabled here, it would still import the compiler with each decorator: seconds at every start",
    text="jit_fuser = torch.compile",
    file="core/jit.py",
)
def _uncompiled(model: Any = None, **options: Any) -> Any:
    return model if model is not None else lambda function: function


@_torch_cuda("Event", "events order the side streams", "core/transformer/moe/moe_layer.py")
class HostEvent(torch.cpu.Event):
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
class HostStream(torch.cpu.Stream):
    """A CUDA stream on a machine where every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def record_event(self, event: HostEvent | None = None) -> HostEvent:  # type: ignore[override]
        """Return `event`, or a new one, recorded now."""
        event = event or HostEvent()
        event.record()
        return event


_BUFFER, _START = "core/distributed/param_and_grad_buffer.py", "training/initialize.py"
_answers("current_stream", HostStream(), "side streams wait for the main one", _BUFFER)
_answers("stream", contextlib.nullcontext(), "work is sent to a side stream", _BUFFER)
_answers(
    "current_device", 0, "device of new tensors; the device mode sends it to the CPU", "core/tensor_parallel/layers.py"
)
_answers("device_count", 1, "with none, model-parallel groups and random states are not set up", _START)
_answers("set_device", None, "each rank picks its GPU", _START)
_answers("synchronize", None, "timers and pipeline sends wait for the GPU", "core/timers.py")
# Ampere's: old enough that nothing takes a Blackwell path, new enough for Megatron's own minimum.
_answers("get_device_capability", (8, 0), "grouped GEMM asks for the architecture", "training/arguments.py")
_answers(
    "get_device_properties",
    SimpleNamespace(name="CPU", major=8, minor=0, multi_processor_count=1, total_memory=0),
    "the architecture decides which flags are legal",
    "training/utils/common_utils.py",
)


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
_RANDOM, _GENERATOR = "core/tensor_parallel/random.py", torch.default_generator


@_torch_cuda("manual_seed", "parameters and dropout are drawn from the GPU's generator", _RANDOM)
def _manual_seed(seed: int) -> None:
    _GENERATOR.manual_seed(seed)


@_torch_cuda("get_rng_state", "checkpoints and tracked random states hold the GPU's", _RANDOM)
def _get_rng_state(device: Any = None) -> torch.Tensor:
    return _GENERATOR.get_state()


@_torch_cuda("set_rng_state", "checkpoints restore the GPU's", "training/checkpointing.py")
def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    _GENERATOR.set_state(new_state)
