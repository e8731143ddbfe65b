"""The process that writes checkpoints in the background, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from more_megatron.platform.cuda_stand_ins import TORCH_CUDA
from more_megatron.platform.packages import silence_absent_package_warnings
from more_megatron.platform.stand_in import install

__all__ = ["async_loop"]


def async_loop(*args: Any) -> None:
    """Run Megatron's loop in a process that starts without the stand-ins of the one that started it."""
    silence_absent_package_warnings()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    install(TORCH_CUDA)
    PersistentAsyncCaller.async_loop(*args)
