"""Runs the stages one after the other, their cases in worlds, and keeps to the time there is."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from more_megatron.errors import MoREError
from more_megatron.evaluation.gpu_check.outcomes import Finding, Outcome, Status
from more_megatron.evaluation.gpu_check.plan import Plan
from more_megatron.evaluation.gpu_check.stages import Case, Stage, references, stages
from more_megatron.evaluation.gpu_check.worlds import World, WorldError
from more_megatron.platform.packages import has_package
from more_megatron.systems import names

__all__ = ["Request", "check"]

# Longer than any case should take; one that hangs must not take the time of all.
_LONGEST = 120.0
# A case that has less time than this is not begun.
_SHORTEST = 5.0
_WORLDS = 8
# PyTorch multiplies float32 as it is, but Transformer Engine rounds it to TF32 unless it is told not to.
_EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}


class Clock:
    """The time there is.

    Args:
        budget: In seconds.
    """

    def __init__(self, budget: float) -> None:
        self._end = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()


class Crew:
    """Worlds that take cases from one list. Those of one rank start at once, those of several when they are needed.

    Args:
        platform: Where they compute.
        size: Number of worlds of one rank.
        clock: The time there is.
        threads: Of the CPU, for each rank.
    """

    def __init__(self, platform: str, size: int, clock: Clock, threads: int) -> None:
        self._platform, self._clock, self._size = platform, clock, size
        self._environment = {"OMP_NUM_THREADS": str(threads), **_EXACT}
        self._free: dict[int, queue.SimpleQueue[World]] = {1: queue.SimpleQueue()}
        for _ in range(size):
            self._free[1].put(self._world(1))
        self._fresh: World | None = None

    def run(self, stage: Stage) -> Iterator[Outcome]:
        """Yield the outcomes of a stage as they come."""
        if stage.alone:
            fresh, self._fresh = self._fresh or self._world(1), None
            self.close()
            self._free[1].put(fresh)
            self._size = 1
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        with ThreadPoolExecutor(self._size if stage.parallel else 1) as threads:
            for case in stage.cases:
                threads.submit(self._answer, stage, case, outcomes)
            for _ in stage.cases:
                yield outcomes.get()

    def prepare_for(self, stages: list[Stage]) -> None:
        """Let a world import what a stage needs that takes the device alone, while others are under way."""
        if any(stage.alone for stage in stages):
            self._fresh = self._world(1)

    def close(self) -> None:
        """End all worlds; none may be at work."""
        if self._fresh is not None:
            self._fresh.close()
        for free in self._free.values():
            while not free.empty():
                free.get().close()

    def _world(self, ranks: int) -> World:
        return World(self._platform, ranks, self._environment)

    def _answer(self, stage: Stage, case: Case, outcomes: queue.SimpleQueue[Outcome]) -> None:
        if self._clock.left < _SHORTEST:
            outcomes.put(Outcome(stage.letter, case.name, Status.SKIPPED, reason="no time left"))
            return
        if case.ranks not in self._free:
            self._free[case.ranks] = queue.SimpleQueue()
            self._free[case.ranks].put(self._world(case.ranks))
        world = self._free[case.ranks].get()
        outcome, usable = _ask(world, stage, case, self._clock)
        if not usable:
            world.close()
            world = self._world(case.ranks)
        self._free[case.ranks].put(world)
        outcomes.put(outcome)


def _ask(world: World, stage: Stage, case: Case, clock: Clock) -> tuple[Outcome, bool]:
    """Return the outcome of a case, and whether its world can be used again."""
    start = time.monotonic()
    try:
        findings: list[Finding] = world.call(case.work, *case.arguments, timeout=max(min(_LONGEST, clock.left), 0.0))
    except WorldError as error:
        seconds = time.monotonic() - start
        reason = str(error) if clock.left > 0 else "no time left"
        status = Status.FAILED if clock.left > 0 else Status.SKIPPED
        return Outcome(stage.letter, case.name, status, seconds, reason=reason, details=error.details), False
    figures = {name: value for finding in findings for name, value in finding.figures.items()}
    faults = [fault for finding in findings for fault in finding.faults]
    status = Status.FAILED if faults else Status.PASSED
    seconds = time.monotonic() - start
    return Outcome(stage.letter, case.name, status, seconds, figures, "; ".join(faults)), True


@dataclass(frozen=True)
class Request:
    """What is to be checked.

    Attributes:
        letters: Stages.
        systems: Names of systems; None: all.
        budget: Seconds that it may take.
        dry: Whether a CPU in miniature takes the place of the GPU.
        gpus: Number of GPUs.
    """

    letters: str
    systems: list[str] | None
    budget: float
    dry: bool
    gpus: int


def check(request: Request, begin: Callable[[Stage], None], report: Callable[[Outcome], None]) -> None:
    """Run the stages.

    Args:
        request: What is to be checked.
        begin: Called as each stage begins.
        report: Called with each outcome as it comes.

    Raises:
        MoREError: If a system does not exist.
    """
    clock, cores = Clock(request.budget), os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="more-check-") as folder:
        plan = _plan(request, Path(folder))
        # Small models leave a device idle: several processes share it.
        size = min(_WORLDS, cores if plan.dry else max(cores // 2, 1))
        background = Crew("cpu", 1, clock, max(cores // 2, 1))
        crew = Crew(plan.platform, size, clock, max(cores // size // 2, 1))
        # The CPU's part is done while the others import and look at the environment.
        helper = threading.Thread(target=_do_references, args=(background, plan, report))
        helper.start()
        try:
            _run_stages(crew, [stage for stage in stages(plan) if stage.letter in request.letters], begin, report)
        finally:
            helper.join()
            crew.close()
            background.close()


def _plan(request: Request, folder: Path) -> Plan:
    for name in request.systems or ():
        if name not in names():
            raise MoREError(f"--systems {name} does not exist: choose among {', '.join(names())}")
    return Plan(
        dry=request.dry,
        systems=tuple(request.systems or names()),
        folder=folder,
        ranks=2 if request.dry else request.gpus,
        has_te=not request.dry and has_package("transformer_engine"),
    )


def _run_stages(
    crew: Crew, chosen: list[Stage], begin: Callable[[Stage], None], report: Callable[[Outcome], None]
) -> None:
    crew.prepare_for(chosen[1:])
    for stage in chosen:
        begin(stage)
        if stage.obstacle:
            report(Outcome(stage.letter, stage.title, Status.SKIPPED, reason=stage.obstacle))
            continue
        for outcome in crew.run(stage):
            report(outcome)


def _do_references(crew: Crew, plan: Plan, report: Callable[[Outcome], None]) -> None:
    for outcome in crew.run(Stage("b", "the CPU's part", references(plan))):
        if outcome.status is not Status.PASSED:
            report(outcome)
