"""A stand-in for SLURM on one machine: it sets SLURM's variables, starts tasks, and passes signals on.

`srun` starts one task for each node, all of them here. `scontrol` names the nodes and writes down what is requeued.
`scancel` sends a signal to the tasks, and only to them, as SLURM does with `proctrack/cgroup`. `torchrun` is real.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from tests.helpers.ranks import free_port
from tests.helpers.shell import PROJECT

JOB_ID = "4711"

_SRUN = """#!/usr/bin/env bash
set -u
echo "$*" >> "$MORE_TEST_SLURM/srun"
while [[ $1 == --* ]]; do shift; done
tasks=()
# The real one kills its tasks at once.
trap 'kill -KILL "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
printf '%s\\n' "${tasks[@]}" > "$MORE_TEST_SLURM/tasks"
status=0
for task in "${tasks[@]}"; do
    wait "$task" || status=$?
done
exit "$status"
"""
_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") for ((node = 0; node < SLURM_NNODES; node++)); do echo "127.0.0.1"; done ;;
    requeue*) echo "$2" >> "$MORE_TEST_SLURM/requeued" ;;
    *) exit 1 ;;
esac
"""
_TORCHRUN = """#!/bin/sh
exec {python} -m tests.helpers.forking_torchrun "$@"
"""
_SCANCEL = """#!/usr/bin/env bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] || exit 1
xargs kill -TERM < "$MORE_TEST_SLURM/tasks"
"""


def write_slurm(programs: Path) -> None:
    """Write `srun`, `scontrol` and `scancel` into a folder, which is to come first in PATH."""
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": _SRUN, "scontrol": _SCONTROL, "scancel": _SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)


def job_variables(folder: Path, nodes: int, gpus_per_node: int) -> dict[str, str]:
    """Return what SLURM sets in a batch script, and where the stand-ins keep what they are asked.

    Args:
        folder: Folder of the test's.
        nodes: Number of nodes.
        gpus_per_node: GPUs of each.
    """
    return {
        "MORE_TEST_SLURM": str(folder),
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_NNODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus_per_node),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
    }


class Job:
    """A batch script that runs; made by `submit`.

    Attributes:
        log: What script and tasks write.
    """

    def __init__(self, process: subprocess.Popen, folder: Path, log: Path) -> None:
        self._process, self._folder, self.log = process, folder, log

    @property
    def requeued(self) -> list[str]:
        """Jobs that were put back into the queue so far."""
        path = self._folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def wait_for(self, text: str, timeout: float = 300.0) -> None:
        """Wait until the log holds `text`.

        Raises:
            AssertionError: If the job ends before, or the time is over.
        """
        self._wait(lambda: text in self.log.read_text(errors="replace"), timeout)

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for the end and return the exit code of the script.

        Raises:
            AssertionError: If it does not end in time.
        """
        self._wait(lambda: self._process.poll() is not None, timeout, running=False)
        return self._process.returncode

    def time_is_nearly_over(self) -> None:
        """Do what SLURM does under `--signal=B:USR1@...`: tell the script, and nobody else."""
        self._process.send_signal(signal.SIGUSR1)

    def cancel(self) -> None:
        """Send SIGTERM to the script and to all processes of the step, as SLURM does with `proctrack/linuxproc`."""
        tasks = [psutil.Process(int(task)) for task in (self._folder / "tasks").read_text().split()]
        processes = [*tasks, *(child for task in tasks for child in task.children(recursive=True))]
        self._process.terminate()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def _wait(self, condition: Callable[[], bool], timeout: float, running: bool = True) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            ended = running and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise AssertionError(self.log.read_text(errors="replace")[-4000:])
            time.sleep(0.02)


@contextlib.contextmanager
def submit(script: str, flags: str, folder: Path, variables: Mapping[str, str], restarts: int = 0) -> Iterator[Job]:
    """Run a batch script of `examples/slurm` as SLURM does: a copy of it, elsewhere, in the folder of the project.

    Args:
        script: Its name.
        flags: Arguments, separated by blanks.
        folder: Folder of the test's.
        variables: What the user and SLURM set.
        restarts: How often the job was requeued.
    """
    programs, spool, log = folder / "bin", folder / "slurm_script", folder / f"{restarts}.log"
    write_slurm(programs)
    (programs / "torchrun").write_text(_TORCHRUN.format(python=sys.executable))
    (programs / "torchrun").chmod(0o755)
    spool.write_text((PROJECT / "examples" / "slurm" / script).read_text())
    environment = {
        **os.environ,
        **variables,
        "SLURM_RESTART_COUNT": str(restarts),
        "MASTER_PORT": str(free_port()),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VENV": str(folder),
    }
    with open(log, "w") as output:
        process = subprocess.Popen(
            ["bash", str(spool), *flags.split()],
            cwd=PROJECT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Job(process, folder, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a job that a failed test has left. Ranks have groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
