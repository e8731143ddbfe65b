"""Makes the runs of a plan side by side, each once: what is finished is not repeated, what failed is named.

A run is a folder: `log.txt`, all that its attempts said, `finetune.txt`, the same of a second training that begins with
its weights, `evaluation/`, its answers to problems, and `record.json`, written when it has ended.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.command_lines import Flags, arguments_of
from more_megatron.evaluation.comparison.planning import Run
from more_megatron.lifetime import receive_at_end_of_parent
from more_megatron.unfinished import write_whole

_PROJECT = Path(__file__).resolve().parents[3]
LOG, FINETUNE_LOG = "log.txt", "finetune.txt"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"
_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Record:
    """How a run ended."""

    state: str  # `finished` or `failed`
    flags: Flags  # its flags, without folders
    seconds: float  # time of the last attempt
    reason: str = ""  # why it failed
    later: dict[str, Flags] = field(default_factory=dict)  # flags of what came behind its training


def read_record(folder: Path) -> Record | None:
    """Return how the run of a folder ended; None while it has not.

    Raises:
        MoREError: If the record is damaged.
    """
    try:
        return Record(**json.loads((folder / "record.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise MoREError(f"{folder / 'record.json'} is damaged: remove it ({last_line(error)})") from error


@dataclass
class Runner:
    """Makes runs."""

    folder: Path  # of the comparison
    jobs: int  # runs side by side
    processes: int = 1  # ranks of a run
    keeps_weights: bool = False  # whether checkpoints stay when their run has finished
    finetune: Flags | None = None  # of a second training that begins with the weights of each run; None: there is none
    evaluation: Flags | None = None  # of `tools/evaluate.py`, for the weights at the end; None: they are not evaluated

    evaluator: ClassVar = (sys.executable, str(_PROJECT / "tools" / "evaluate.py"))
    # What a run is started with, up to the number of its ranks.
    launcher: ClassVar = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")

    def __post_init__(self) -> None:
        later = {"finetune": self.finetune, "evaluation": self.evaluation}
        self._later = {name: flags for name, flags in later.items() if flags is not None}
        self._left = 0
        self._seconds: list[float] = []

    def make(self, runs: list[Run]) -> bool:
        """Make those that are not finished; they end with this process. Return whether all have finished.

        Raises:
            MoREError: If a finished run of that name had other flags.
        """
        waiting = [run for run in runs if not self._is_finished(run)]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before, {self.jobs} side by side")
        self._left = len(waiting)
        asyncio.run(self._make_all(waiting))
        return all(self._is_finished(run) for run in runs)

    def _is_finished(self, run: Run) -> bool:
        folder = run.folder(self.folder)
        record = read_record(folder)
        if record is None or record.state != "finished":
            return False
        if (record.flags, record.later) != (run.flags, self._later):
            raise MoREError(f"{folder} holds a finished run with other flags: give another --folder, or remove it")
        return True

    async def _make_all(self, runs: list[Run]) -> None:
        waiting = iter(runs)

        async def make_in_turn(place: int) -> None:
            for run in waiting:
                await self._make(run, place)

        making = asyncio.gather(*map(make_in_turn, range(self.jobs)))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, making.cancel)
        try:
            await making
        except asyncio.CancelledError:
            raise MoREError("interrupted; the same command goes on where it was") from None

    async def _make(self, run: Run, place: int) -> None:
        folder = run.folder(self.folder)
        if not (folder / CHECKPOINT / _TRACKER).exists():
            # An attempt that has saved nothing begins anew, and what it said is not to stand beside that.
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        reason = run.arm.refusal or await self._take_steps(run, folder, place)
        seconds = time.monotonic() - start
        record = Record("failed" if reason else "finished", run.flags, seconds, reason, self._later)
        write_whole(folder / "record.json", json.dumps(asdict(record), indent=1))
        if not reason and not self.keeps_weights:
            for weights in folder.glob("*/iter_*"):
                shutil.rmtree(weights)
        self._left -= 1
        if not reason:
            self._seconds.append(seconds)
        said = f"  {run.name}: FAILED: {reason}" if reason else f"  {run.name}: {seconds:.0f} s"
        if self._left and self._seconds:
            minutes = self._left * statistics.fmean(self._seconds) / self.jobs / 60
            said += f"; {self._left} to go, about {minutes:.0f} min"
        print(said, flush=True)

    async def _take_steps(self, run: Run, folder: Path, place: int) -> str:
        """Train, fine-tune and evaluate as far as was asked for; return why it failed, nothing if it did not."""
        weights = folder / CHECKPOINT
        commands = {LOG: self._training(run.flags, save=weights, load=weights)}
        if self.finetune is not None:
            start, weights = weights, folder / "finetuned"
            flags = run.flags | {"finetune": True} | self.finetune
            commands[FINETUNE_LOG] = self._training(flags, save=weights, load=start)
        if self.evaluation is not None:
            folders = {"load": weights, "output": folder / EVALUATION}
            asked = self.evaluation | ({} if run.arm.recurrent else {"num-steps": None}) | folders
            commands[f"{EVALUATION}.txt"] = [*self.evaluator, *arguments_of(asked)]
        for name in {"finetuned", EVALUATION, *commands} - {LOG}:
            # Of an attempt before; training itself goes on where it was.
            path = folder / name
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        for log, command in commands.items():
            if await self._call(command, folder / log, place):
                return _reason(folder / log)
        return ""

    def _training(self, flags: Flags, save: Path, load: Path) -> list[str]:
        """Return the command of a training; flags may name other folders and intervals."""
        places = {
            "data-cache-path": self.folder / "cache",
            "tensorboard-dir": save / "tensorboard",
            "save": save,
            "load": load,
            "save-interval": flags["train-iters"],
        }
        program = str(_PROJECT / "pretrain_more.py")
        return [*self.launcher, "--nproc-per-node", str(self.processes), program, *arguments_of(places | flags)]

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
        threads = max((os.cpu_count() or 1) // (self.jobs * self.processes), 1)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        if gpus := _gpus():
            own = [gpus[(place * self.processes + rank) % len(gpus)] for rank in range(self.processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environment


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


def in_own_process(function: Callable[..., Any], *arguments: Any, log: Path) -> Any:
    """Return what a function returns, called in a process of its own, which may import Megatron and set its globals.

    The function must be importable by name; what the process says goes into the log.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(str(log),)) as pool:
        return pool.submit(function, *arguments).result()


def _begin(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
