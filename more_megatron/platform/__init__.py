"""Makes `megatron-core` run on what is here. Whatever replaces an attribute of another package is a row of a table.

- `cuda/`: stand-ins for CUDA, on a CPU only.
- `repairs/`: repairs of the wheel, on every platform.
- `training_loop`: functions of Megatron's loop that others may surround.

`initialize_platform` is the first thing an entry point calls, before Megatron is imported.
"""

import logging
import os
from enum import StrEnum
from functools import cache

from more_megatron.console import say
from more_megatron.errors import MoREError
from more_megatron.platform.packages import check_apex, has_package, hide_cuda_packages, silence_absent_package_warnings

__all__ = ["Platform", "initialize_platform", "select_platform"]


class Platform(StrEnum):
    """Where tensors live."""

    CPU = "cpu"
    CUDA = "cuda"


def select_platform() -> Platform:
    """Return the platform of this process: `MORE_PLATFORM` if it is set, else CUDA where a GPU is, else the CPU.

    Raises:
        MoREError: If `MORE_PLATFORM` names no platform, or CUDA where there is none.
    """
    import torch

    forced = os.environ.get("MORE_PLATFORM", "").strip().lower()
    if not forced:
        return Platform.CUDA if torch.cuda.is_available() else Platform.CPU
    if forced not in set(Platform):
        raise MoREError(f"MORE_PLATFORM={forced} is not a platform: set it to cpu or cuda, or leave it out")
    if forced == Platform.CUDA and not torch.cuda.is_available():
        raise MoREError("MORE_PLATFORM=cuda, but PyTorch sees no GPU: check the driver, or set MORE_PLATFORM=cpu")
    return Platform(forced)


@cache
def initialize_platform() -> Platform:
    """Prepare this process for Megatron, once, and return its platform.

    Raises:
        MoREError: As `select_platform`, or if the package `apex` is not NVIDIA's.
    """
    check_apex()
    platform = select_platform()
    if platform is Platform.CPU:
        _install_cpu_platform()
    else:
        _announce_cuda()
    _repair_wheel()
    return platform


def _announce_cuda() -> None:
    import torch

    # Not the name of a device: to ask for it would take memory of the first one, on every rank.
    devices = f"{torch.cuda.device_count()} GPUs on this node"
    say(f"> platform: cuda (nccl, {devices}, CUDA {torch.version.cuda}); chosen by MORE_PLATFORM or the GPUs' presence")


def _install_cpu_platform() -> None:
    # Compiled fusions need a C++ compiler at run time and gain nothing here. Read when torch.compile is first used.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # Megatron asserts this CUDA setting under tensor parallelism; without CUDA nothing reads it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    hide_cuda_packages()
    silence_absent_package_warnings()
    absent = "" if has_package("transformer_engine") else ", no Transformer Engine"
    say(f"> platform: cpu (gloo, float32{absent}); chosen by MORE_PLATFORM or the absence of a GPU")

    from more_megatron.platform.cuda.pytorch import PYTORCH, enter_for_good
    from more_megatron.platform.cuda.torch_cuda import NO_COMPILER, TORCH_CUDA
    from more_megatron.platform.memory import keep_freed_memory
    from more_megatron.platform.stand_in import install

    if os.environ["TORCH_COMPILE_DISABLE"] == "1":
        install(NO_COMPILER)
    install(TORCH_CUDA + PYTORCH)
    enter_for_good()
    keep_freed_memory()

    from more_megatron.platform.cuda.megatron import MEGATRON_ON_CPU

    install(MEGATRON_ON_CPU)
    # The tracker compares the CPU's random state around a fork of the GPU's; here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: record.getMessage() != "CPU RNG state changed within GPU RNG context"
    )


def _repair_wheel() -> None:
    from more_megatron.platform.repairs.table import WHEEL_REPAIRS
    from more_megatron.platform.stand_in import install

    # Its timer logs the traceback of what passes through it, which is reported where it ends.
    logging.getLogger("megatron.core.utils").addFilter(lambda record: "Traceback (most" not in record.getMessage())
    install(WHEEL_REPAIRS)
