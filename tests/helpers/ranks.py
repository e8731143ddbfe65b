"""Starts W ranks and runs a function on each: the one way in which tests use more than one process.

Ranks are forked from a server process that has imported Megatron once, so that a world costs a fraction of a second.
"""

import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# What the server process imports.
PRELOADED = "tests.helpers.preload"
# Below those that Linux takes for outgoing connections.
_PORTS = range(10_000, 32_000)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Run `function(*args)` on every rank of a new world and return what each rank returned.

    Args:
        world_size: Number of ranks.
        function: Importable by name; finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
        args: Arguments, the same on every rank.
        timeout: Seconds after which the world is ended and the test fails.

    Raises:
        AssertionError: If a rank raised, exited or did not finish; the message holds its traceback and output.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    port = free_port()
    with alone(world_size), tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(world_size)]
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            call = (sender, rank, world_size, port, str(logs[rank]), function, args)
            process = context.Process(target=_rank_main, args=call)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, logs, timeout)
        finally:
            for process in processes:
                _end(process)


@contextlib.contextmanager
def alone(world_size: int) -> Iterator[None]:
    """Wait until no other test process has a world of several ranks: two of them would slow each other down many times.

    Args:
        world_size: Number of ranks; a single one need not wait.
    """
    if world_size == 1:
        yield
        return
    with open(Path(tempfile.gettempdir(), f"more-tests-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank_main(
    sender: Connection, rank: int, world_size: int, port: int, log: str, function: Callable[..., Any], args: tuple
) -> None:
    # A group of its own, so that what the rank itself starts ends with it.
    os.setsid()
    os.environ.update(rank_environment(rank, world_size, port))
    with open(log, "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        try:
            outcome = (True, function(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
    sender.send(outcome)
    sender.close()
    # Rank 0 holds the store of the process group; it may only leave when all are done.
    time.sleep(3600)


def _collect(pipes: list[Connection], logs: list[Path], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"not finished after {timeout:.0f} s\n{_tails(logs)}")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, result = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} exited\n{_tails(logs)}") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{result}\n{_tails(logs)}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _tails(logs: list[Path], characters: int = 4000) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-characters:]}" for log in logs if log.exists())


def _end(process: multiprocessing.process.BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def free_port() -> int:
    """Return a port that is free at present, and that no outgoing connection is given later."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
