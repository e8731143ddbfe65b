"""Processes end with the one that started them, however that ended; a run that finished ends in order."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

from more_megatron.errors import MoREError

_SECONDS = 0.5
_SECONDS_FOR_A_NAME = 60
_PR_SET_PDEATHSIG = 1


def check_launcher() -> None:
    """Check what a launcher has said of this rank, where one has.

    Raises:
        MoREError: If it cannot be.
    """
    numbers = {
        name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ
    }
    for name, number in numbers.items():
        if not number.isdecimal():
            raise MoREError(f"the environment variable {name} is {number!r}: torchrun sets it to a number")
    rank, world_size = int(numbers.get("RANK", 0)), int(numbers.get("WORLD_SIZE", 1))
    if rank >= world_size:
        raise MoREError(
            f"the environment variables say rank {rank} of {world_size}: count ranks from 0 to below WORLD_SIZE"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun has looked for it.
        _wait_for_name(os.environ.get("MASTER_ADDR", ""))


def _wait_for_name(host: str) -> None:
    """Wait until a node's name is known, as it may be a little after the node is there.

    PyTorch would look for it twice as long as --distributed-timeout-minutes, and log where it stood then.
    """
    for _ in range(_SECONDS_FOR_A_NAME):
        with contextlib.suppress(OSError, UnicodeError):
            socket.getaddrinfo(host or None, 0)
            return
        time.sleep(1.0)
    raise MoREError(f"the name {host!r} of MASTER_ADDR does not resolve: give an address of the node of rank 0")


def end_with_launcher() -> None:
    """End this rank when torchrun is gone: ranks without it train on, beside those that the next one starts.

    What else may have started a rank, a shell above all, may end before it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent(os.getppid())
        # A rank that is stopped runs no thread.
        receive_at_end_of_parent(signal.SIGKILL)


def receive_at_end_of_parent(number: int) -> None:
    """Let this process receive a signal when the one that started it has ended, however that did. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def forks_end_with_this() -> None:
    """Let what is forked from this process from now on, such as writers of checkpoints, end with it."""
    here = os.getpid()

    def after_fork() -> None:
        if os.getppid() == here:  # Not in a fork of a fork, which its own parent looks after.
            _end_with_parent(here)

    os.register_at_fork(after_in_child=after_fork)


def say_at_sigterm(say: Callable[[], None]) -> None:
    """Call `say` before SIGTERM ends this process, wherever its main thread is: in a kernel, or in a collective.

    torchrun sends it to the ranks that are left when one was killed, which says nothing itself.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    former = signal.set_wakeup_fd(sender.detach())

    def handler(*_: object) -> None:
        """Stand in the place of the default, which ends the process at once."""

    def watch() -> None:
        # Megatron's own handler, which saves first, may have taken the place of this one.
        while receiver.recv(1)[0] != signal.SIGTERM or signal.getsignal(signal.SIGTERM) is not handler:
            pass
        say()
        os._exit(128 + signal.SIGTERM)

    def after_fork() -> None:
        signal.set_wakeup_fd(former)
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handler)
    os.register_at_fork(after_in_child=after_fork)
    threading.Thread(target=watch, name="say at SIGTERM", daemon=True).start()


def how_to_continue() -> str:
    """Return how a run that was interrupted goes on; nothing where it saves nothing."""
    from megatron.training import global_vars

    from more_megatron.checkpoint_files import newest_complete_iteration

    save = getattr(global_vars._GLOBAL_ARGS, "save", None)
    if not save:
        return ""
    newest = newest_complete_iteration(Path(save))
    if newest is None:
        return f": nothing is saved in {save} yet, the same command starts anew"
    return f": the same command with --load {save} continues from iteration {newest}"


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """End the process after the block, with its threads ended before the interpreter.

    Each process group has threads in C++, and Megatron leaves all groups behind. A thread that asks for the interpreter
    while that ends is ended where it stands, within destructors that must not be left: `terminate called without an
    active exception`, after the last line of a run, where a thread is late.
    """
    import torch
    from megatron.training import get_tensorboard_writer

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


def end_with_starter() -> None:
    """End this process of `multiprocessing` with the one that asked for it, not at a SIGTERM that both receive."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    starter = multiprocessing.parent_process()
    assert starter is not None
    _end_after(starter.join)


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Keep SIGTERM from processes that are started in the block until `end_with_starter` has them ignore it."""
    resource_tracker.ensure_running()  # It would lift the mask when it starts.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _end_with_parent(parent: int) -> None:
    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS)

    _end_after(wait)


def _end_after(wait: Callable[[], object]) -> None:
    def watch() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
