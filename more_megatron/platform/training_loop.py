"""What stands around functions of Megatron's training loop, which calls them by their names in its module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.training import training

__all__ = ["surround"]


def surround(name: str, around: Callable[..., Any]) -> None:
    """Let the training loop call `around(former, ...)` from now on where it calls a function of its module.

    Args:
        name: The function.
        around: Takes what has stood there until now, and the arguments of the call.
    """
    setattr(training, name, functools.partial(around, getattr(training, name)))
