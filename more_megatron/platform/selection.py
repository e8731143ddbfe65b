"""Which platform a process is on."""

from __future__ import annotations

import os
from enum import StrEnum

from more_megatron.errors import MoREError

__all__ = ["Platform", "select_platform"]


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
