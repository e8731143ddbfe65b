"""The processes that Megatron writes checkpoints with, and the signals that a run outlives to save once more.

A launcher that ends a run sends SIGTERM to its whole process group. With `--exit-signal-handler` the ranks save before
they leave, which takes these processes.
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.managers import SyncManager
from typing import Any

from more_megatron.lifetime import end_with_starter, starting_deaf
from more_megatron.platform.packages import silence_absent_package_warnings
from more_megatron.platform.selection import Platform, select_platform

__all__ = ["PickledQueue", "async_loop", "results_queue"]

_queue: PickledQueue | None = None


class PickledQueue:
    """A queue whose keeper sees bytes: to read what is in it, it would import PyTorch and Megatron, in every rank.

    Args:
        queue: Queue of a manager.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        """Add an item."""
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Return the oldest item.

        Raises:
            queue.Empty: If there is none.
        """
        return pickle.loads(self._queue.get_nowait())


def results_queue(mp_mode: str = "spawn") -> PickledQueue:
    """Return the queue over which writers report, kept by a process that ends with this one, and not at a SIGTERM.

    Args:
        mp_mode: How that process is started.
    """
    global _queue
    if _queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        with starting_deaf():
            manager.start(initializer=end_with_starter)
        # What a manager hands out holds on to it, and with it to its process.
        _queue = PickledQueue(manager.Queue())
    return _queue


def async_loop(*args: Any) -> None:
    """Run Megatron's loop of the background writer.

    It runs in a process that starts anew, without the stand-ins of the one that started it.
    """
    end_with_starter()
    from more_megatron.platform.stand_in import install

    if select_platform() is Platform.CPU:
        silence_absent_package_warnings()
        from more_megatron.platform.cuda_stand_ins import TORCH_CUDA

        install(TORCH_CUDA)
    from more_megatron.platform.failed_writes import WRITERS

    install(WRITERS)
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)
