"""Runs `pretrain_more.py` itself on W ranks, as a launcher does, and says how each rank ended.

The ranks are forked from the server process of `ranks.py`, which has imported Megatron.
"""

import contextlib
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.helpers.ranks import PRELOADED, alone, free_port, rank_environment

_ENTRY_POINT = Path(__file__).parents[2] / "pretrain_more.py"
_LOSS = "lm loss: "


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int  # exit code; minus the signal where one ended it
    stdout: str  # what it wrote to standard output
    stderr: str  # what it wrote to standard error


class Program:
    """Ranks of `pretrain_more.py`, running from the moment the object is made.

    Args:
        ranks: Number of ranks.
        command_line: Flags, separated by blanks.
        environment: Further environment variables.
        prepare: Called on each rank before the program starts; importable by name.
    """

    def __init__(
        self,
        ranks: int,
        command_line: str,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], Any] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._folder = tempfile.TemporaryDirectory()
        self._alone = contextlib.ExitStack()
        self._alone.enter_context(alone(ranks))
        port = free_port()
        self._processes: list[BaseProcess] = []
        for rank in range(ranks):
            variables = {**rank_environment(rank, ranks, port), **(environment or {})}
            call = (variables, str(self._log(rank, "out")), str(self._log(rank, "err")), command_line, prepare)
            process = context.Process(target=_rank_main, args=call)
            process.start()
            self._processes.append(process)

    def output(self) -> str:
        """Return what all ranks have written so far."""
        logs = sorted(Path(self._folder.name).iterdir())
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240.0) -> None:
        """Wait until `condition` holds.

        Raises:
            AssertionError: If the ranks ended before, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or any(process.exitcode is not None for process in self._processes):
                self._end()
                self._alone.close()
                raise AssertionError(f"did not come to the expected point\n{self.output()[-4000:]}")
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to all ranks."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def wait(self, timeout: float = 240.0) -> list[Ended]:
        """Wait for the end and return how each rank ended.

        As under torchrun, the end of one rank with an error is the end of all.

        Raises:
            AssertionError: If the ranks do not end in time.
        """
        with self._alone:
            self._join(timeout)
        return [
            Ended(
                process.exitcode or 0, *(self._log(rank, kind).read_text(errors="replace") for kind in ("out", "err"))
            )
            for rank, process in enumerate(self._processes)
        ]

    def _join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while running := [process for process in self._processes if process.exitcode is None]:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"not finished after {timeout:.0f} s\n{self.output()[-4000:]}")
            wait([process.sentinel for process in running], timeout=1.0)
            if any(process.exitcode for process in self._processes):
                self._end()

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()

    def _log(self, rank: int, kind: str) -> Path:
        return Path(self._folder.name, f"rank{rank}.{kind}")


def pretrain_more(
    ranks: int,
    command_line: str,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], Any] | None = None,
) -> list[Ended]:
    """Run the program to its end; arguments as for `Program`."""
    return Program(ranks, command_line, environment, prepare).wait()


def finished(command_line: str, ranks: int = 1, prepare: Callable[[], Any] | None = None) -> str:
    """Run the program to its end and return what its ranks wrote.

    Raises:
        AssertionError: If a rank ends with an error.
    """
    ended = pretrain_more(ranks, command_line, prepare=prepare)
    output = "\n".join(rank.stdout + rank.stderr for rank in ended)
    assert [rank.code for rank in ended] == [0] * ranks, output[-4000:]
    return output


def refused(ended: Ended, *parts: str) -> None:
    """Assert that a rank ended with one line on standard error which holds `parts`."""
    assert ended.code == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("pretrain_more.py: error: ")]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    for part in parts:
        assert part in lines[0]


def losses_by_iteration(output: str) -> dict[int, str]:
    """Return the losses of a run's log lines, as printed."""
    losses = {}
    for line in output.splitlines():
        if _LOSS in line and " iteration " in line:
            iteration = int(line.split(" iteration ")[1].split("/")[0])
            losses[iteration] = line.split(_LOSS)[1].split(" ")[0]
    return losses


def _rank_main(
    variables: dict[str, str], out: str, err: str, command_line: str, prepare: Callable[[], Any] | None
) -> None:
    os.setsid()
    # What this process starts it forks, as it would had a launcher started it.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(variables)
    for path, stream, number in ((out, "stdout", 1), (err, "stderr", 2)):
        file = open(path, "w", buffering=1)  # noqa: SIM115 - open until the process ends
        os.dup2(file.fileno(), number)
        setattr(sys, stream, file)
    sys.argv = [str(_ENTRY_POINT), *shlex.split(command_line)]
    sys.path.insert(0, str(_ENTRY_POINT.parent))
    if prepare is not None:
        prepare()
    runpy.run_path(str(_ENTRY_POINT), run_name="__main__")
