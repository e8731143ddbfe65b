"""What runs have reached: figures of one run from its files, and of an arm over its seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from more_megatron.evaluation.analysis.health_page import read_health
from more_megatron.evaluation.comparison.experiment import mean_steps
from more_megatron.evaluation.comparison.planning import Plan, PlannedArm, Run
from more_megatron.evaluation.comparison.runner import CHECKPOINT, EVALUATION, FINETUNE_LOG, LOG, read_record
from more_megatron.evaluation.training_log import TrainingLog, read_log
from more_megatron.monitoring import HEALTH_FILE

_LOSS = "lm loss"
# Two-sided confidence of an interval.
_CONFIDENCE = 0.95

Answers = dict[int, dict[str, float]]
"""Figures of answers by recurrence steps (0: none to choose) and name."""
ByDifficulty = dict[int, dict[str, dict[int, float]]]
"""Exact match by recurrence steps (0: none to choose), task and difficulty."""


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    deviation: float  # sample standard deviation; NaN with one seed
    count: int  # seeds; where one of them is not finite, mean and deviation are not

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of one value a seed."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, len(values))
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, len(values))


def spreads[Key: float](pairs: Iterable[tuple[Key, float]]) -> dict[Key, Spread]:
    """Return the spread of the values of each key, in order of the keys."""
    values: dict[Key, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: Spread.of(values[key]) for key in sorted(values)}


@dataclass(frozen=True)
class Difference:
    """An arm against another, seed by seed."""

    mean: float  # mean of the differences of losses, in nats; below 0 the arm is better
    half_width: float  # half of their 95 % interval by Student's t; NaN with one seed
    p_value: float  # two-sided, of a paired t-test; NaN with one seed
    percent: float  # by how much the loss is lower, in percent of that of the other
    count: int  # seeds that both have finished
    is_carried: bool  # whether the interval excludes zero: otherwise nothing is to be concluded


@dataclass(frozen=True)
class RunResult:
    """What one run has reached."""

    name: str
    seed: int
    state: str  # `finished`, `failed`, or `missing` if it has not ended
    reason: str = ""  # why it failed
    loss: float = math.nan  # validation loss in nats at the end of training
    losses: dict[int, float] = field(default_factory=dict)  # the same by recurrence steps
    curve: dict[int, float] = field(default_factory=dict)  # training loss by training step
    validations: dict[int, float] = field(default_factory=dict)  # validation loss by training step
    # Figures of answers, such as the exact match of a task: of generated ones if the run was evaluated, else as the log
    # has them; after fine-tuning if there was such
    answers: Answers = field(default_factory=dict)
    by_difficulty: ByDifficulty = field(default_factory=dict)  # exact match of generated answers
    # Records of health.jsonl; empty where the run wrote none
    health: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ArmResult:
    """What an arm has reached at one point of the sweep, with its runs of all seeds."""

    arm: PlannedArm
    runs: tuple[RunResult, ...]

    @property
    def finished(self) -> list[RunResult]:
        """The runs that have ended well."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def watched(self) -> list[list[Mapping[str, Any]]]:
        """Records of health of each finished run that has some."""
        return [run.health for run in self.finished if run.health]

    @property
    def loss(self) -> Spread | None:
        """Validation loss in nats; None without a finished run."""
        return Spread.of([run.loss for run in self.finished]) if self.finished else None

    @property
    def loss_at(self) -> dict[int, Spread]:
        """Validation loss by recurrence steps."""
        return spreads(pair for run in self.finished for pair in run.losses.items())

    @property
    def step_tokens(self) -> float:
        """Tokens of a training step; 0 of an arm that was refused."""
        return self.arm.tokens / int(self.arm.flags.get("train-iters", 1))

    @property
    def answers(self) -> dict[str, dict[int, Spread]]:
        """Figures of answers by name and recurrence steps (0: none to choose)."""
        found = [(depth, at) for run in self.finished for depth, at in run.answers.items()]
        return _by_name((name, depth, value) for depth, at in found for name, value in at.items())

    @property
    def usual_depth(self) -> int:
        """Of the recurrence steps at which problems were answered those nearest to the mean of training."""
        depths = {depth for run in self.finished for depth in run.by_difficulty}
        return min(depths, key=lambda depth: abs(depth - mean_steps(self.arm.flags)), default=0)

    @property
    def by_difficulty(self) -> dict[str, dict[int, Spread]]:
        """Exact match by task and difficulty, at the usual depth."""
        depth = self.usual_depth
        found = [item for run in self.finished for item in run.by_difficulty.get(depth, {}).items()]
        return _by_name((task, difficulty, exact) for task, at in found for difficulty, exact in at.items())


def _by_name(found: Iterable[tuple[str, int, float]]) -> dict[str, dict[int, Spread]]:
    by_name: dict[str, list[tuple[int, float]]] = {}
    for name, place, value in found:
        by_name.setdefault(name, []).append((place, value))
    return {name: spreads(by_name[name]) for name in sorted(by_name)}


def collect(plan: Plan, folder: Path) -> list[ArmResult]:
    """Return what the arms of a plan have reached at each point, from the folder of the comparison."""
    runs = plan.runs
    return [
        ArmResult(arm, tuple(_result(run, run.folder(folder)) for run in runs if run.arm is arm)) for arm in plan.arms
    ]


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
    half_width = p_value = math.nan
    if len(pairs) > 1:
        from scipy import stats

        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(_CONFIDENCE)
        half_width, p_value = float(interval.high - interval.low) / 2, float(test.pvalue)
    return Difference(mean, half_width, p_value, percent, len(pairs), is_carried=abs(mean) > half_width)


def _result(run: Run, folder: Path) -> RunResult:
    record = read_record(folder)
    if record is None:
        return RunResult(run.name, run.seed, "missing")
    result = RunResult(run.name, run.seed, record.state, record.reason)
    if record.state != "finished":
        return result
    result = _trained(result, folder)
    if (found := folder / EVALUATION / "results.json").exists():
        answers, by_difficulty = _generated(found)
        return replace(result, answers=answers, by_difficulty=by_difficulty)
    if (log := folder / FINETUNE_LOG).exists():
        return replace(result, answers=_answers(_last_evaluation(_read(log))))
    return result


def _trained(result: RunResult, folder: Path) -> RunResult:
    """Return a result with what the log of the training says, and its records of health."""
    log, weights = _read(folder / LOG), folder / CHECKPOINT
    if not log.validations:
        return replace(result, state="failed", reason=f"no validation loss in {folder / LOG}")
    at_depths = _last_evaluation(log)
    return replace(
        result,
        loss=log.validations[-1].loss,
        losses={depth: figures[_LOSS] for depth, figures in at_depths.items() if _LOSS in figures},
        curve={line.number: line.loss for line in log.iterations},
        validations={line.iteration: line.loss for line in log.validations},
        answers=_answers(at_depths),
        health=read_health(weights) if (weights / HEALTH_FILE).exists() else [],
    )


def _read(path: Path) -> TrainingLog:
    return read_log(path.read_text(errors="replace").splitlines())


def _last_evaluation(log: TrainingLog) -> Answers:
    return log.evaluations.get(log.validations[-1].iteration, {}) if log.validations else {}


def _answers(at_depths: Answers) -> Answers:
    answers = {depth: {name: value for name, value in at.items() if name != _LOSS} for depth, at in at_depths.items()}
    return {depth: at for depth, at in answers.items() if at}


def _generated(path: Path) -> tuple[Answers, ByDifficulty]:
    """Return the exact match of answers in a `results.json`, as a whole and by difficulty."""
    answers: Answers = {}
    by_difficulty: ByDifficulty = {}
    for record in json.loads(path.read_text())["results"]:
        depth = record["num_steps"] or 0
        for name, measures in record["measures"].items():
            answers.setdefault(depth, {})[f"{name} exact match"] = measures["exact_match"]
        for task, found in record.get("by_difficulty", {}).items():
            exact = {int(difficulty): measures["exact_match"] for difficulty, measures in found.items()}
            by_difficulty.setdefault(depth, {}).setdefault(task, {}).update(exact)
    return answers, by_difficulty
