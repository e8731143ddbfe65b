"""What runs have reached: figures of one run from its log, and of an arm over its seeds."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from more_megatron.evaluation.analysis.health_page import read_health
from more_megatron.evaluation.comparison.experiment import mean_steps
from more_megatron.evaluation.comparison.planning import Plan, PlannedArm, Run
from more_megatron.evaluation.comparison.runner import CHECKPOINT, EVALUATION, FINETUNE_LOG, LOG, read_record
from more_megatron.evaluation.comparison.tasks import Answers, ByDifficulty, read_evaluation
from more_megatron.evaluation.training_log import TrainingLog, read_log
from more_megatron.monitoring.flags import HEALTH_FILE

__all__ = ["ArmResult", "Difference", "RunResult", "Spread", "collect", "difference", "results_by_arm", "task_names"]

_EVALUATION = re.compile(
    r"evaluation at iteration (\d+)\b(?! on test set)(?:[^|]*? with (\d+) recurrence steps)?[^|]*\| (.*) \|"
)
_FIGURE = re.compile(r"([^|:]+?): ([-+.\dE]+|nan|[-+]?inf)", re.IGNORECASE)
_LOSS = "lm loss"
# Two-sided confidence of an interval.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Attributes:
        mean: Mean.
        deviation: Sample standard deviation; NaN with one seed.
        count: Seeds. If one of them is not finite, mean and deviation are not.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of one value a seed."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, len(values))
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Difference:
    """An arm against another, seed by seed.

    Attributes:
        mean: Mean of the differences of losses, in nats; below 0 the arm is better.
        half_width: Half of their 95 % interval by Student's t; NaN with one seed.
        p_value: Two-sided, of a paired t-test; NaN with one seed.
        percent: By how much the loss is lower, in percent of that of the other.
        count: Seeds that both have finished.
    """

    mean: float
    half_width: float
    p_value: float
    percent: float
    count: int

    @property
    def is_carried(self) -> bool:
        """Whether the interval excludes zero: otherwise nothing is to be concluded."""
        return abs(self.mean) > self.half_width


@dataclass(frozen=True)
class RunResult:
    """What one run has reached.

    Attributes:
        name: Name of the run.
        seed: Seed.
        state: `finished`, `failed`, or `missing` if it has not ended.
        reason: Why it failed.
        loss: Validation loss in nats at the end of training.
        losses: The same by recurrence steps.
        curve: Training loss by training step.
        validations: Validation loss by training step.
        answers: Figures of answers, such as the exact match of a task: of generated ones if the run was evaluated, else
            as the log has them; after fine-tuning if there was such.
        by_difficulty: Exact match of generated answers.
        tokens_per_second: As trained, beside other runs.
        health: Records of health.jsonl; empty where the run wrote none.
    """

    name: str
    seed: int
    state: str
    reason: str = ""
    loss: float = math.nan
    losses: dict[int, float] = field(default_factory=dict)
    curve: dict[int, float] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    answers: Answers = field(default_factory=dict)
    by_difficulty: ByDifficulty = field(default_factory=dict)
    tokens_per_second: float = math.nan
    health: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ArmResult:
    """What an arm has reached at one point of the sweep.

    Attributes:
        arm: What was trained.
        runs: Its runs, all seeds.
    """

    arm: PlannedArm
    runs: tuple[RunResult, ...]

    @property
    def finished(self) -> list[RunResult]:
        """The runs that have ended well."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def loss(self) -> Spread | None:
        """Validation loss in nats; None without a finished run."""
        return Spread.of([run.loss for run in self.finished]) if self.finished else None

    @property
    def depths(self) -> list[int]:
        """Recurrence steps at which runs were evaluated."""
        return sorted({depth for run in self.finished for depth in run.losses})

    @property
    def step_tokens(self) -> float:
        """Tokens of a training step; 0 of an arm that was refused."""
        return self.arm.tokens / int(self.arm.flags.get("train-iters", 1))

    def loss_at(self, depth: int) -> Spread | None:
        """Return the validation loss at a number of recurrence steps."""
        values = [run.losses[depth] for run in self.finished if depth in run.losses]
        return Spread.of(values) if values else None

    def answers_at(self, depth: int, figure: str) -> Spread | None:
        """Return a figure of answers at a number of recurrence steps."""
        values = [run.answers.get(depth, {}).get(figure) for run in self.finished]
        known = [value for value in values if value is not None]
        return Spread.of(known) if known else None

    @property
    def usual_depth(self) -> int:
        """Of the recurrence steps at which problems were answered those nearest to the mean of training."""
        depths = {depth for run in self.finished for depth in run.by_difficulty}
        return min(depths, key=lambda depth: abs(depth - mean_steps(self.arm.flags)), default=0)

    def by_difficulty(self, task: str) -> dict[float, Spread]:
        """Return the exact match of a task at the usual depth by difficulty."""
        values: dict[int, list[float]] = {}
        for run in self.finished:
            for difficulty, exact in run.by_difficulty.get(self.usual_depth, {}).get(task, {}).items():
                values.setdefault(difficulty, []).append(exact)
        return {difficulty: Spread.of(each) for difficulty, each in sorted(values.items())}


def collect(plan: Plan, folder: Path) -> list[RunResult]:
    """Return what the runs of a plan have reached, in its order.

    Args:
        plan: The plan.
        folder: Folder of the comparison.
    """
    return [_result(run, folder / "runs" / run.name) for run in plan.runs]


def results_by_arm(plan: Plan, runs: list[RunResult]) -> list[ArmResult]:
    """Return the arms at each point, with their runs."""
    pairs = list(zip(plan.runs, runs, strict=True))
    return [ArmResult(arm, tuple(result for run, result in pairs if run.arm == arm)) for arm in plan.arms]


def task_names(arms: Sequence[ArmResult]) -> list[str]:
    """Return the tasks whose problems have difficulties."""
    return sorted({task for arm in arms for run in arm.finished for at in run.by_difficulty.values() for task in at})


def difference(arm: ArmResult, baseline: ArmResult) -> Difference | None:
    """Return how an arm differs from the baseline over the seeds of both; None without such a seed.

    A seed gives both the same samples in the same order, and depths drawn alike, so that differences within a seed
    vary less than losses do.
    """
    others = {run.seed: run.loss for run in baseline.finished}
    pairs = [(run.loss, others[run.seed]) for run in arm.finished if run.seed in others]
    if not pairs:
        return None
    differences = [own - other for own, other in pairs]
    mean = statistics.fmean(differences)
    percent = -100 * mean / statistics.fmean(other for _, other in pairs)
    if len(pairs) == 1 or arm is baseline:
        return Difference(mean, math.nan, math.nan, percent, len(pairs))
    from scipy import stats

    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(_CONFIDENCE)
    return Difference(mean, float(interval.high - interval.low) / 2, float(test.pvalue), percent, len(pairs))


def _result(run: Run, folder: Path) -> RunResult:
    record = read_record(folder)
    if record is None:
        return RunResult(run.name, run.seed, "missing")
    if record.state != "finished":
        return RunResult(run.name, run.seed, record.state, record.reason)
    result = _of_log(RunResult(run.name, run.seed, record.state), _lines(folder / LOG), folder)
    if (found := folder / EVALUATION / "results.json").exists():
        answers, by_difficulty = read_evaluation(found)
        return dataclasses.replace(result, answers=answers, by_difficulty=by_difficulty)
    if not (folder / FINETUNE_LOG).exists():
        return result
    tuned = _lines(folder / FINETUNE_LOG)
    last = read_log(tuned).validations
    return dataclasses.replace(result, answers=_answers(_at_depths(tuned, last[-1].iteration if last else 0)))


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _of_log(result: RunResult, lines: list[str], folder: Path) -> RunResult:
    log: TrainingLog = read_log(lines)
    if not log.validations:
        return dataclasses.replace(result, state="failed", reason=f"no validation loss in {folder / LOG}")
    last, weights = log.validations[-1], folder / CHECKPOINT
    at_depths = _at_depths(lines, last.iteration)
    return dataclasses.replace(
        result,
        loss=last.loss,
        losses={depth: figures[_LOSS] for depth, figures in at_depths.items() if _LOSS in figures},
        curve={line.number: line.loss for line in log.iterations},
        validations={line.iteration: line.loss for line in log.validations},
        answers=_answers(at_depths),
        tokens_per_second=log.tokens_per_second(),
        health=read_health(weights) if (weights / HEALTH_FILE).exists() else [],
    )


def _at_depths(lines: list[str], iteration: int) -> dict[int, dict[str, float]]:
    """Return the figures of the last evaluation by recurrence steps; 0: there are none to choose."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        match = _EVALUATION.search(line)
        if match and int(match[1]) == iteration:
            # Of two at the same iteration the later one is that at the end of training.
            figures = {name.strip(): float(value) for name, value in _FIGURE.findall(match[3])}
            found[int(match[2] or 0)] = figures
    return found


def _answers(at_depths: Answers) -> Answers:
    """Return what evaluations say of answers."""
    return {
        depth: {name: value for name, value in figures.items() if name != _LOSS}
        for depth, figures in at_depths.items()
        if set(figures) - {_LOSS}
    }
