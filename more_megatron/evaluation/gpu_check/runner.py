"""Runs the stages one after the other, their cases in worlds, and keeps to the time there is."""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from more_megatron.errors import MoREError
from more_megatron.evaluation.gpu_check.outcomes import Finding, Report, Status
from more_megatron.evaluation.gpu_check.plan import DRY, GPU, Plan
from more_megatron.evaluation.gpu_check.stages import LETTERS, Case, Stage, stages
from more_megatron.evaluation.gpu_check.worlds import World, WorldError
from more_megatron.flags import check_ranges
from more_megatron.platform.packages import has_package
from more_megatron.systems import names

# Longer than any case should take; one that hangs must not take the time of all.
_LONGEST = 120.0
# A case that has less time than this is not begun.
_SHORTEST = 5.0
_WORLDS = 8
# PyTorch multiplies float32 as it is, but Transformer Engine rounds it to TF32 unless it is told not to.
_EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
_NO_TIME = "no time left"


@dataclass
class Crew:
    """Worlds that take cases from one list. Those of one rank start at once, those of several when they are needed."""

    platform: str  # where they compute
    size: int  # number of worlds of one rank
    deadline: float  # until when there is time, by `time.monotonic`
    threads: int  # of the CPU, for each rank

    def __post_init__(self) -> None:
        self._free = {1: [self._world(1) for _ in range(self.size)]}

    def run(self, stage: Stage) -> Iterator[Finding]:
        """Yield what the cases of a stage find, as it comes."""
        if stage.alone:
            self.close()
            self.size = 1
        with ThreadPoolExecutor(self.size if stage.parallel else 1) as threads:
            answers = [threads.submit(self._answer, stage.letter, case) for case in stage.cases]
            for answer in as_completed(answers):
                yield answer.result()

    def close(self) -> None:
        """End all worlds; none may be at work."""
        for free in self._free.values():
            while free:
                free.pop().close()

    def _world(self, ranks: int) -> World:
        return World(self.platform, ranks, {"OMP_NUM_THREADS": str(self.threads), **_EXACT})

    def _answer(self, letter: str, case: Case) -> Finding:
        finding = Finding(stage=letter, case=case.name)
        if self.deadline - time.monotonic() < _SHORTEST:
            finding.skipped = _NO_TIME
            return finding
        free = self._free.setdefault(case.ranks, [])
        world = free.pop(0) if free else self._world(case.ranks)
        start = time.monotonic()
        try:
            timeout = max(min(_LONGEST, self.deadline - start), 0.0)
            for found in world.call(case.work, *case.arguments, timeout=timeout):
                finding.figures |= found.figures
                finding.faults += found.faults
                finding.skipped = finding.skipped or found.skipped
        except WorldError as error:
            world.close()
            world = self._world(case.ranks)
            finding.details = error.details
            if time.monotonic() < self.deadline:
                finding.faults.append(str(error))
            else:
                finding.skipped = _NO_TIME
        free.append(world)
        finding.seconds = time.monotonic() - start
        return finding


def check(args: argparse.Namespace, command: str) -> Report:
    """Run the stages that the flags of `tools/check_gpu.py` name, and return the report.

    Raises:
        MoREError: If a stage or system does not exist, or there is no GPU.
    """
    deadline, cores = time.monotonic() + args.budget, os.cpu_count() or 1
    if not args.stages or set(args.stages) - set(LETTERS):
        raise MoREError(f"--stages {args.stages!r} must be one or more of the letters {LETTERS}")
    check_ranges(args, {"budget": "(0, inf)"})
    ranks = 2 if args.dry_run else _gpus()
    report = Report(args.output, command)
    for name in args.systems or ():
        if name not in names():
            raise MoREError(f"--systems {name} does not exist: choose among {', '.join(names())}")
    with tempfile.TemporaryDirectory(prefix="more-check-") as folder, ExitStack() as stack:
        has_te = not args.dry_run and has_package("transformer_engine")
        sizes = DRY if args.dry_run else GPU
        systems = tuple(args.systems or names())
        plan = Plan(args.dry_run, sizes, systems, Path(folder), ranks, has_te)
        # Small models leave a device idle: several processes share it.
        size = min(_WORLDS, cores if plan.dry else max(cores // 2, 1))

        def crew_on(platform: str) -> Crew:
            return stack.enter_context(closing(Crew(platform, size, deadline, threads=max(cores // size // 2, 1))))

        crew = crew_on(plan.platform)
        chosen = [stage for stage in stages(plan) if stage.letter in args.stages]
        cpu = crew if plan.dry or not any(stage.before for stage in chosen) else crew_on("cpu")
        for stage in chosen:
            _run(stage, crew, cpu, report)
    return report


def _gpus() -> int:
    import torch

    if (count := torch.cuda.device_count()) == 0:
        raise MoREError("PyTorch sees no GPU: check the driver, or give --dry-run")
    return count


def _run(stage: Stage, crew: Crew, cpu: Crew, report: Report) -> None:
    report.begin(stage.letter, stage.title)
    if stage.obstacle:
        report.add(Finding(skipped=stage.obstacle, stage=stage.letter, case=stage.title))
        return
    for finding in cpu.run(Stage(stage.letter, "the CPU's part", stage.before)):
        if finding.status is not Status.PASSED:
            report.add(finding)
    for finding in crew.run(stage):
        report.add(finding)
