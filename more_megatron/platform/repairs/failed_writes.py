"""A checkpoint that cannot be written, on a full disk above all: one line, and no wait for what will not come.

Read by the processes that write checkpoints as well: nothing here imports Megatron's trainer.
"""

import logging
import queue
import threading
from multiprocessing import connection
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from more_megatron.errors import MoREError, one_line_errors
from more_megatron.lifetime import sigterm_blocked
from more_megatron.platform.stand_in import Table

WRITERS = Table()
CALLERS = Table()
_PATIENCE_SECONDS = 5.0
_WRITE = filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread
_LOGGER = logging.getLogger(filesystem_async.__name__)


@WRITERS.replaces(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data_multithread",
    why="where a thread cannot write, the process ends before it has said so, and the run waits for it",
    text="assert isinstance(local_results_or_exc, list), type(local_results_or_exc)",
)
def _write(transforms: list, use_msc: bool, rank: int, write_buckets: list, results: Any) -> None:
    """Write as Megatron does, and hand over the reason of a failure: it would be logged, and a number be missing."""
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            reasons.append(record.getMessage())
        return record.levelno < logging.ERROR

    outcome: queue.Queue = queue.Queue()
    _LOGGER.addFilter(keep)
    try:
        _WRITE(transforms, use_msc, rank, write_buckets, outcome)
        written = outcome.get_nowait()
    except (Exception, AssertionError) as error:
        written = error
    finally:
        _LOGGER.removeFilter(keep)
    results.put(OSError(reasons[0] if reasons else str(written)) if isinstance(written, Exception) else written)


@CALLERS.surrounds(
    "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller._get_process",
    why="where it ends, as for lack of memory, the run waits without end; and a SIGTERM ends the server it comes from",
    text="self._persistent_preload_q.join()",
)
def _get_process(former: Any, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any) -> Any:
    """Return Megatron's writer, without which the run does not go on: queues wait for it without end.

    It is a child of this process, not of a server that a SIGTERM to all processes would end.
    """
    is_new = async_utils.PersistentAsyncCaller._persistent_process is None
    with sigterm_blocked():
        process = former(rank, "spawn", *args, **kwargs)
    if is_new:
        threading.Thread(target=_end_with, args=(process,), name="end with writer", daemon=True).start()
    return process


def _end_with(process: Any) -> None:
    connection.wait([process.sentinel])
    process.join(_PATIENCE_SECONDS)  # It ends in its own time when the run does, and is then joined by it.
    if process.exitcode:
        with one_line_errors("pretrain_more.py"):
            raise MoREError(
                f"the process that writes checkpoints has ended (exit code {process.exitcode}, -9 is often a lack of "
                "memory): the same command continues from the newest complete checkpoint"
            )
