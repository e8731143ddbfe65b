"""Processes that have imported Megatron and wait for work: one rank or several, on a GPU each or on the CPU.

A process for each call would import for longer than it computes; one process for everything would end with the first
kernel that fails, since CUDA does not recover. So a world is used until a call fails, and then replaced. A process is
on one platform: the CPU's stand-in for CUDA and CUDA itself exclude each other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["World", "WorldError"]

_LAST_LINES = 30


class WorldError(Exception):
    """A call that raised, died or took too long.

    Attributes:
        details: Traceback, and the end of what the ranks printed.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class World:
    """Ranks that start at once and are there when they are needed.

    Args:
        platform: `cpu` or `cuda`.
        ranks: Number of ranks.
        environment: Further environment variables.
    """

    def __init__(self, platform: str, ranks: int = 1, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="more-check-")
        self._pipes: list[Connection] = []
        self._processes = []
        port = _free_port()
        for rank in range(ranks):
            variables = {"MORE_PLATFORM": platform, **_rank_environment(rank, ranks, port), **(environment or {})}
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, variables, str(self._log(rank))))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: str, *args: Any, timeout: float) -> list[Any]:
        """Return what a function returned on each rank.

        Args:
            function: `module:name`; the module is imported by the ranks.
            args: Arguments, the same on every rank.
            timeout: Seconds after which the call is given up.

        Raises:
            WorldError: If a rank raised, ended or did not finish. The world cannot be used again.
        """
        try:
            for pipe in self._pipes:
                pipe.send((function, args))
        except OSError as error:
            raise WorldError("the process has ended", self._output()) from error
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(pending, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise WorldError(f"not finished after {timeout:.0f} s", self._output())
            for rank in [self._pipes.index(pipe) for pipe in ready]:  # type: ignore[arg-type]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End the ranks and all that they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        self._folder.cleanup()

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, result = self._pipes[rank].recv()
        except EOFError as error:
            raise WorldError(f"the process of rank {rank} ended", self._output()) from error
        if not succeeded:
            message, trace = result
            raise WorldError(message, f"{trace}\n{self._output()}")
        return result

    def _output(self) -> str:
        logs = (self._log(rank) for rank in range(len(self._pipes)))
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        return "\n".join(lines[-_LAST_LINES:])

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank{rank}.log")


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # All ranks are on this machine, whose own name need not resolve.
        "GLOO_SOCKET_IFNAME": "lo",
        # Megatron asserts it under tensor parallelism.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Nothing here may ask the network.
        "HF_HUB_OFFLINE": "1",
        # Read by `one_line_errors`, which would end the process.
        "MORE_TRACEBACK": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(pipe: Connection, environment: Mapping[str, str], log: str) -> None:
    """Answer calls until the other end is gone."""
    # A group of its own, so that what the rank itself starts ends with it.
    os.setsid()
    os.environ.update(environment)
    with open(log, "w", buffering=1) as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        sys.stdout = sys.stderr = output
        ready = _attempt(_import_all)
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:
                return
            pipe.send(_attempt(_call, function, *args) if ready[0] else ready)


def _attempt(function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException as error:
        message = " ".join(str(error).split()) or type(error).__name__
        return False, (f"{type(error).__name__}: {message[:400]}", traceback.format_exc())


def _call(function: str, *args: Any) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*args)


def _import_all() -> None:
    from more_megatron.platform import initialize_platform

    # Before Megatron is imported.
    initialize_platform()
    importlib.import_module("more_megatron.evaluation.runs")
    # What is here now stays: collecting garbage between runs need not look at it again.
    gc.collect()
    gc.freeze()
