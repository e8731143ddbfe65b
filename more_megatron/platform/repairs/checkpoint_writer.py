"""The processes that Megatron writes checkpoints with, and the signals that a run outlives to save once more.

A launcher that ends a run sends SIGTERM to its whole process group. With `--exit-signal-handler` the ranks save before
they leave, which takes these processes.
"""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.managers import SyncManager
from typing import Any

from more_megatron.lifetime import end_with_starter, sigterm_blocked
from more_megatron.platform import Platform, select_platform
from more_megatron.platform.packages import silence_absent_package_warnings
from more_megatron.platform.stand_in import Table, install

CHECKPOINT_WRITER = Table()
_queue: PickledQueue | None = None


class PickledQueue:
    """A manager's queue that sees bytes: to read what is in it, it would import PyTorch and Megatron, in every rank."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        """Add an item."""
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Return the oldest item, or raise `queue.Empty`."""
        return pickle.loads(self._queue.get_nowait())


@CHECKPOINT_WRITER.replaces(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
    why="its process ends at the SIGTERM that a run outlives to save once more, and imports PyTorch and Megatron",
    text="_results_queue = ctx.Manager().Queue()",
)
def results_queue(mp_mode: str = "spawn") -> PickledQueue:
    """Return the queue over which writers report, kept by a process that ends with this one, and not at a SIGTERM."""
    global _queue
    if _queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        with sigterm_blocked():
            manager.start(initializer=end_with_starter)
        # What a manager hands out holds on to it, and with it to its process.
        _queue = PickledQueue(manager.Queue())
    return _queue


@CHECKPOINT_WRITER.replaces(
    "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop",
    why="as above, and without a GPU it picks one among none",
    text="torch.cuda.set_device(rank % torch.cuda.device_count())",
)
def async_loop(*args: Any) -> None:
    """Run Megatron's loop of the background writer, in a process that starts anew, without stand-ins of its starter."""
    end_with_starter()
    if select_platform() is Platform.CPU:
        silence_absent_package_warnings()
        from more_megatron.platform.cuda.torch_cuda import TORCH_CUDA

        install(TORCH_CUDA)
    from more_megatron.platform.repairs.failed_writes import WRITERS

    install(WRITERS)
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)
