"""Processes that have imported Megatron and wait for work: one rank or several, on a GPU each or on the CPU.

A process for each call would import for longer than it computes; one process for everything would end with the first
kernel that fails, since CUDA does not recover. So a world is used until a call fails, and then replaced. A process is
on one platform: the CPU's stand-in for CUDA and CUDA itself exclude each other.
"""

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from more_megatron.lifetime import end_with_starter

_LAST_LINES = 30


class WorldError(Exception):
    """A call that raised, died or took too long; `details` is its traceback, and the end of what the ranks printed."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class World:
    """Ranks on a platform, `cpu` or `cuda`, that start at once and are there when they are needed."""

    def __init__(self, platform: str, ranks: int, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="more-check-")
        port, context = _free_port(), multiprocessing.get_context("spawn")
        self._ranks: list[ProcessPoolExecutor] = []
        for rank in range(ranks):
            variables = {"MORE_PLATFORM": platform, **_rank_environment(rank, ranks, port), **environment}
            if platform == "cpu":
                variables["CUDA_VISIBLE_DEVICES"] = ""  # What asks PyTorch for a GPU gets the answer of a CPU.
            log = str(Path(self._folder.name, f"rank{rank}.log"))
            self._ranks.append(ProcessPoolExecutor(1, context, _begin, (variables, log)))
        self._processes = [pool.submit(os.getpid) for pool in self._ranks]
        for pool in self._ranks:
            pool.submit(_import_all)

    def call(self, function: str, *args: Any, timeout: float) -> list[Any]:
        """Return what a function, `module:name`, returned on each rank for the same arguments.

        Raises:
            WorldError: If a rank raised, ended or did not finish in time. The world cannot be used again.
        """
        try:
            answers = [pool.submit(_call, function, *args) for pool in self._ranks]
        except BrokenProcessPool as error:
            raise WorldError("the process has ended", self._output()) from error
        done, late = wait(answers, timeout, FIRST_EXCEPTION)
        results = [self._result(rank, answer) for rank, answer in enumerate(answers) if answer in done]
        if late:
            raise WorldError(f"not finished after {timeout:.0f} s", self._output())
        return results

    def close(self) -> None:
        """End the ranks and all that they started."""
        for process in self._processes:
            with contextlib.suppress(BrokenProcessPool, ProcessLookupError):
                os.killpg(process.result(), signal.SIGKILL)
        for pool in self._ranks:
            pool.shutdown()
        self._folder.cleanup()

    def _result(self, rank: int, answer: Future) -> Any:
        try:
            return answer.result()
        except BrokenProcessPool as error:
            raise WorldError(f"the process of rank {rank} ended", self._output()) from error
        except WorldError as error:
            raise WorldError(str(error), f"{error.details}\n{self._output()}") from None

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


def _begin(environment: Mapping[str, str], log: str) -> None:
    # A group of its own, so that what the rank itself starts ends with it.
    os.setsid()
    end_with_starter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    with open(log, "w") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _call(function: str, *args: Any) -> Any:
    module, name = function.split(":")
    try:
        _import_all()
        return getattr(importlib.import_module(module), name)(*args)
    except BaseException as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise WorldError(f"{type(error).__name__}: {message[:400]}", traceback.format_exc()) from None


@functools.cache
def _import_all() -> None:
    from more_megatron.platform import initialize_platform

    # Before Megatron is imported.
    initialize_platform()
    importlib.import_module("more_megatron.evaluation.runs")
    # What is here now stays: collecting garbage between runs need not look at it again.
    gc.collect()
    gc.freeze()
