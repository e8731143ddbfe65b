"""What the memory of a run's machines can hold at all."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from more_megatron.errors import MoREError
from more_megatron.platform import Platform, select_platform

_CGROUP = Path("/sys/fs/cgroup/memory.max")
# Of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def check_fits_host(size: float, what: str, remedy: str) -> None:
    """Refuse what is larger, in bytes, than the memory of this machine: it would fill it for minutes, and be killed.

    Raises:
        MoREError: If it is larger; it says what it is and how to make it smaller.
    """
    _check(size, _host_memory(), what, remedy)


def check_fits_devices(size: float, what: str, remedy: str) -> None:
    """As `check_fits_host`, for what is spread over the devices of all ranks. Rank 0 checks for all."""
    if os.environ.get("RANK", "0") != "0":
        return
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if select_platform() is Platform.CUDA:
        memory = ranks * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        memory = _host_memory() * max(1, ranks // local)
    _check(size, memory, what, remedy)


def _check(size: float, memory: float, what: str, remedy: str) -> None:
    if size > memory:
        raise MoREError(f"{what} would take {size / 1e9:,.0f} GB, and the memory is {memory / 1e9:,.0f} GB: {remedy}")


def _host_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # There is no limit, or no such file.
        memory = min(memory, int(_CGROUP.read_text()))
    return memory


def keep_freed_memory() -> None:
    """Let the process keep what tensors free for those that follow, as PyTorch's allocator of a GPU's memory does.

    glibc returns each block above 32 MB to the system, whose pages are cleared again every time: that takes longer than
    an activation function. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
