"""Runs the stages one after the other, their cases in worlds, and keeps to the time there is."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from more_megatron.evaluation.gpu_check.outcomes import Finding, Outcome, Status
from more_megatron.evaluation.gpu_check.plan import Plan
from more_megatron.evaluation.gpu_check.stages import Case, Stage, references, stages
from more_megatron.evaluation.gpu_check.worlds import World, WorldError

__all__ = ["check"]

# Longer than any case should take; one that hangs must not take the time of all.
_LONGEST = 120.0
# A case that has less time than this is not begun.
_SHORTEST = 5.0
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
    """Worlds of one rank that take cases from one list.

    Args:
        platform: Where they compute.
        size: Number of worlds.
        clock: The time there is.
        threads: Of the CPU, for each world.
    """

    def __init__(self, platform: str, size: int, clock: Clock, threads: int) -> None:
        self._platform, self._clock = platform, clock
        self._environment = {"OMP_NUM_THREADS": str(threads), **_EXACT}
        self._free: queue.SimpleQueue[World] = queue.SimpleQueue()
        self._size = size
        for _ in range(size):
            self._free.put(self._world())

    def run(self, stage: Stage) -> Iterator[Outcome]:
        """Yield the outcomes of a stage as they come."""
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        with ThreadPoolExecutor(self._size if stage.parallel else 1) as threads:
            for case in stage.cases:
                threads.submit(lambda case=case: outcomes.put(self._answer(stage, case)))
            for _ in stage.cases:
                yield outcomes.get()

    def close(self) -> None:
        """End all worlds; none may be at work."""
        while not self._free.empty():
            self._free.get().close()

    def _world(self, ranks: int = 1) -> World:
        return World(self._platform, ranks, self._environment)

    def _answer(self, stage: Stage, case: Case) -> Outcome:
        if self._clock.left < _SHORTEST:
            return Outcome(stage.letter, case.name, Status.SKIPPED, reason="no time left")
        if case.ranks > 1:
            world = self._world(case.ranks)
            outcome, _ = _ask(world, stage, case, self._clock)
            world.close()
            return outcome
        world = self._free.get()
        outcome, usable = _ask(world, stage, case, self._clock)
        if not usable:
            world.close()
            world = self._world()
        self._free.put(world)
        return outcome


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


def check(
    plan: Plan, letters: str, budget: float, begin: Callable[[Stage], None], report: Callable[[Outcome], None]
) -> None:
    """Run the stages.

    Args:
        plan: What the check is made of.
        letters: Stages to run.
        budget: Seconds it may take.
        begin: Called as each stage begins.
        report: Called with each outcome as it comes.
    """
    clock, cores = Clock(budget), os.cpu_count() or 1
    # Small models leave a device idle: several processes share it.
    size = min(4, max(cores // 2, 1))
    chosen = [stage for stage in stages(plan) if stage.letter in letters]
    background = Crew("cpu", 1, clock, max(cores // 2, 1))
    crew = Crew(plan.platform, size, clock, max(cores // size // 2, 1))
    # The CPU's part is done while the others import and look at the environment.
    helper = threading.Thread(target=_do_references, args=(background, plan, report), daemon=True)
    helper.start()
    try:
        for stage in chosen:
            begin(stage)
            if stage.obstacle:
                report(Outcome(stage.letter, stage.title, Status.SKIPPED, reason=stage.obstacle))
                continue
            for outcome in crew.run(stage):
                report(outcome)
    finally:
        helper.join()
        crew.close()
        background.close()


def _do_references(crew: Crew, plan: Plan, report: Callable[[Outcome], None]) -> None:
    for outcome in crew.run(Stage("b", "the CPU's part", references(plan))):
        if outcome.status is not Status.PASSED:
            report(outcome)
