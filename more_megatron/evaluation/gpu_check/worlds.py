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
    """A call that raised, died or took too long; `details` is its traceback, and the end of what the ranks printed."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class World:
    """Ranks on a platform, `cpu` or `cuda`, that start at once and are there when they are needed."""

    def __init__(self, platform: str, ranks: int, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="more-check-")
        self._pipes: list[Connection] = []
        self._processes = []
        port = _free_port()
        for rank in range(ranks):
            variables = {"MORE_PLATFORM": platform, **_rank_environment(rank, ranks, port), **environment}
            if platform == "cpu":
                variables["CUDA_VISIBLE_DEVICES"] = ""  # What asks PyTorch for a GPU gets the answer of a CPU.
            ours, theirs = context.Pipe()
            log = str(Path(self._folder.name, f"rank{rank}.log"))
            process = context.Process(target=_serve, args=(theirs, variables, log))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: str, *args: Any, timeout: float) -> list[Any]:
        """Return what a function, `module:name`, returned on each rank for the same arguments.

        Raises:
            WorldError: If a rank raised, ended or did not finish in time. The world cannot be used again.
        """
        try:
            for pipe in self._pipes:
                pipe.send((function, args))
        except OSError as error:
            raise WorldError("the process has ended", self._output()) from error
        deadline = time.monotonic() + timeout
        results: dict[Connection, Any] = {}
        while len(results) < len(self._pipes):
            pending = [pipe for pipe in self._pipes if pipe not in results]
            ready = wait(pending, max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise WorldError(f"not finished after {timeout:.0f} s", self._output())
            results |= {pipe: self._receive(pipe) for pipe in pending if pipe in ready}
        return [results[pipe] for pipe in self._pipes]

    def close(self) -> None:
        """End the ranks and all that they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        self._folder.cleanup()

    def _receive(self, pipe: Connection) -> Any:
        try:
            succeeded, result = pipe.recv()
        except EOFError as error:
            rank = self._pipes.index(pipe)
            raise WorldError(f"the process of rank {rank} ended", self._output()) from error
        if not succeeded:
            message, trace = result
            raise WorldError(message, f"{trace}\n{self._output()}")
        return result

    def _output(self) -> str:
        logs = sorted(Path(self._folder.name).iterdir())
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        return "\n".join(lines[-_LAST_LINES:])


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        # All ranks are on this machine, whose own name need not resolve.
        "GLOO_SOCKET_IFNAME": "lo",
        # Megatron asserts it under tensor parallelism.
        "CUDA_DEVICE_MAX_CONNECTIONS": 1,
        # Nothing here may ask the network.
        "HF_HUB_OFFLINE": 1,
        # Read by `one_line_errors`, which would end the process.
        "MORE_TRACEBACK": 1,
    }
    return {name: str(value) for name, value in values.items()}


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
