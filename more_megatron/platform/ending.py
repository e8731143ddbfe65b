"""The end of a run that finished."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

import torch
from megatron.training import get_tensorboard_writer

__all__ = ["orderly_end"]


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """End the process after the block, with its threads ended before the interpreter.

    Each process group has threads in C++, and Megatron leaves all groups behind. A thread that asks for the interpreter
    while that ends is ended where it stands, within destructors that must not be left: `terminate called without an
    active exception`, after the last line of a run, where a thread is late.
    """
    code = 0
    try:
        yield
    except SystemExit as leaving:  # Megatron's way out at --exit-interval and its kin
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _end_readers()
    # What an ordinary end does before it takes the interpreter down.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_readers() -> None:
    """End the processes that read data, which an ordinary end would wait for.

    With `--exit-signal-handler` they outlive the SIGTERM that it sends them, so that the run can save once more.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take their end for a failure.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
