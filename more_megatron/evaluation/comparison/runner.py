"""Makes the runs of a plan side by side, each once: what is finished is not repeated, what failed is named.

A run is a folder: `log.txt`, all that its attempts said, `finetune.txt`, the same of a second training that begins with
its weights, `evaluation/`, its answers to problems, and `record.json`, written when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.comparison.experiment import Flags, command_line
from more_megatron.evaluation.comparison.planning import Run
from more_megatron.lifetime import receive_at_end_of_parent
from more_megatron.unfinished import unfinished_file

__all__ = ["CHECKPOINT", "EVALUATION", "FINETUNE_LOG", "LOG", "Record", "Runner", "apart", "read_record"]

_PROJECT = Path(__file__).resolve().parents[3]
LOG, FINETUNE_LOG = "log.txt", "finetune.txt"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Record:
    """How a run ended.

    Attributes:
        state: `finished` or `failed`.
        flags: Its flags, without folders.
        seconds: Time of the last attempt.
        reason: Why it failed.
        later: Flags of what came behind its training.
    """

    state: str
    flags: Flags
    seconds: float
    reason: str = ""
    later: dict[str, Flags] = field(default_factory=dict)


def read_record(folder: Path) -> Record | None:
    """Return how the run of a folder ended; None while it has not."""
    try:
        return Record(**json.loads((folder / "record.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise MoREError(f"{folder / 'record.json'} is damaged: remove it ({last_line(error)})") from error


class Runner:
    """Makes runs.

    Args:
        folder: Folder of the comparison.
        jobs: Runs side by side.
        processes: Ranks of a run.
        keeps_weights: Whether checkpoints stay when their run has finished.
        finetune: Flags of a second training that begins with the weights of each run; None: there is none.
        evaluation: Flags of `tools/evaluate.py`, for the weights at the end; None: they are not evaluated.
    """

    evaluator = (sys.executable, str(_PROJECT / "tools" / "evaluate.py"))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    """What a run is started with, up to the number of its ranks."""

    def __init__(
        self,
        folder: Path,
        jobs: int,
        processes: int = 1,
        keeps_weights: bool = False,
        finetune: Flags | None = None,
        evaluation: Flags | None = None,
    ) -> None:
        self._folder, self._jobs, self._processes = folder, jobs, processes
        self._keeps_weights, self._finetune, self._evaluation = keeps_weights, finetune, evaluation
        later = {"finetune": finetune, "evaluation": evaluation}
        self._later = {name: flags for name, flags in later.items() if flags is not None}
        self._seconds: list[float] = []
        self._left = 0

    def make(self, runs: list[Run]) -> bool:
        """Make those that are not finished; they end with this process. Return whether all have finished.

        Raises:
            MoREError: If a finished run of that name had other flags.
        """
        waiting = [run for run in runs if not self._is_finished(run)]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before, {self._jobs} side by side")
        self._left = len(waiting)
        asyncio.run(self._make_all(waiting))
        return all(self._is_finished(run) for run in runs)

    def _is_finished(self, run: Run) -> bool:
        record = read_record(self._run_folder(run))
        if record is None or record.state != "finished":
            return False
        if (record.flags, record.later) != (_flags(run), self._later):
            raise MoREError(
                f"{self._run_folder(run)} holds a finished run with other flags: give another --folder, or remove it"
            )
        return True

    def _run_folder(self, run: Run) -> Path:
        return self._folder / "runs" / run.name

    async def _make_all(self, runs: list[Run]) -> None:
        places: asyncio.Queue[int] = asyncio.Queue()
        for place in range(self._jobs):
            places.put_nowait(place)

        async def make_in_turn(run: Run) -> None:
            place = await places.get()
            try:
                await self._make(run, place)
            finally:
                places.put_nowait(place)

        loop, tasks = asyncio.get_running_loop(), [asyncio.ensure_future(make_in_turn(run)) for run in runs]
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: [task.cancel() for task in tasks])
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise MoREError("interrupted; the same command goes on where it was") from None

    async def _make(self, run: Run, place: int) -> None:
        folder = self._run_folder(run)
        if not (folder / CHECKPOINT / _TRACKER).exists():
            # An attempt that has saved nothing begins anew, and what it said is not to stand beside that.
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        start, flags = time.monotonic(), _flags(run)
        if run.arm.refusal is not None:
            record = Record("failed", flags, 0.0, run.arm.refusal, self._later)
        else:
            reason = await self._take_steps(run, folder, place)
            state, seconds = "failed" if reason else "finished", time.monotonic() - start
            record = Record(state, flags, seconds, reason, self._later)
        with unfinished_file(folder / "record.json") as unfinished:
            unfinished.write_text(json.dumps(asdict(record), indent=1))
        if record.state == "finished" and not self._keeps_weights:
            for weights in folder.glob("*/iter_*"):
                shutil.rmtree(weights)
        self._say(run, record)

    async def _take_steps(self, run: Run, folder: Path, place: int) -> str:
        """Train, fine-tune and evaluate as far as was asked for; return why it failed, nothing if it did not."""
        flags, weights = _flags(run), folder / CHECKPOINT
        commands = {LOG: self._training(self._folders(weights, flags) | flags)}
        if self._finetune is not None:
            flags = {name: value for name, value in (flags | self._finetune).items() if value is not None}
            start: Flags = {"load": weights, "finetune": True}
            weights = folder / "finetuned"
            commands[FINETUNE_LOG] = self._training(self._folders(weights, flags) | start | flags)
        if self._evaluation is not None:
            asked = self._evaluation | ({} if run.arm.recurrent else {"num-steps": None}) | {"load": weights}
            asked = {name: value for name, value in asked.items() if value is not None}
            commands[f"{EVALUATION}.txt"] = [*self.evaluator, *command_line(asked | {"output": folder / EVALUATION})]
        for name in {"finetuned", EVALUATION, *commands} - {LOG}:
            # Of an attempt before; training itself goes on where it was.
            shutil.rmtree(folder / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        for log, command in commands.items():
            if await self._call(command, folder / log, place):
                return _reason(folder / log)
        return ""

    def _folders(self, checkpoint: Path, flags: Flags) -> Flags:
        """Return what a run is given besides its flags: where it writes to, and continues from."""
        return {
            "data-cache-path": self._folder / "cache",
            "tensorboard-dir": checkpoint / "tensorboard",
            "save": checkpoint,
            "load": checkpoint,
            "save-interval": flags["train-iters"],
        }

    def _training(self, flags: Flags) -> list[str]:
        program = str(_PROJECT / "pretrain_more.py")
        return [*self.launcher, "--nproc-per-node", str(self._processes), program, *command_line(flags)]

    async def _call(self, command: list[str], log: Path, place: int) -> int:
        with open(log, "a") as output:
            # The launcher, and with it the ranks, ends when this process does.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdout=output,
                stderr=output,
                env=self._environment(place),
                preexec_fn=lambda: receive_at_end_of_parent(signal.SIGTERM),
            )
            try:
                return await process.wait()
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
                raise

    def _environment(self, place: int) -> dict[str, str]:
        """Return the environment of a run: its share of the cores, and GPUs of its own where there are."""
        threads = max((os.cpu_count() or 1) // (self._jobs * self._processes), 1)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        if gpus := _gpus():
            own = [gpus[(place * self._processes + rank) % len(gpus)] for rank in range(self._processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environment

    def _say(self, run: Run, record: Record) -> None:
        self._left -= 1
        if record.state == "finished":
            self._seconds.append(record.seconds)
        outcome = f"{record.seconds:.0f} s" if record.state == "finished" else f"FAILED: {record.reason}"
        left = ""
        if self._left and self._seconds:
            minutes = self._left * sum(self._seconds) / len(self._seconds) / self._jobs / 60
            left = f"; {self._left} to go, about {minutes:.0f} min"
        print(f"  {run.name}: {outcome}{left}", flush=True)


def _flags(run: Run) -> Flags:
    return run.arm.flags | {"seed": run.seed}


def _reason(log: Path) -> str:
    """Return the line of a log that says why the run ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line] or [line for line in lines if "Error" in line]
    return f"{(errors or lines or ['it said nothing'])[0]} (log: {log})"


def _gpus() -> list[str]:
    """Return the GPUs there are, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    if os.environ.get("MORE_PLATFORM") == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return [str(index) for index, _ in enumerate(listed.splitlines())]


def apart(function: Callable[..., Any], *arguments: Any, log: Path) -> Any:
    """Return what a function returns, called in a process of its own, which may import Megatron and set its globals.

    Args:
        function: Importable by name.
        arguments: Its arguments.
        log: Where that process writes what it says.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin_apart, initargs=(str(log),)) as pool:
        return pool.submit(function, *arguments).result()


def _begin_apart(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
