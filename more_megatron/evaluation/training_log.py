"""Reads the lines that Megatron's trainer, and our evaluation in it, print.

Ranks share one output, so that a line of one may begin where a line of another ends: nothing here is anchored at the
beginning of a line.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_MILLISECONDS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_SEQUENCES = re.compile(r"global batch size: +(\d+)")
_LOSS = re.compile(r"lm loss: (\S+)")
_STEPS = re.compile(r"recurrence steps: (\S+)")
# Logs of Megatron itself call the loss on the test set validation, too.
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+)\b(?! on test set).*?lm loss value: (\S+) \| lm loss PPL: (\S+)"
)
_EVALUATION = re.compile(
    r"evaluation at iteration (\d+)\b(?! on test set)(?:[^|]*? with (\d+) recurrence steps)?[^|]*\| (.*) \|"
)
_FIGURE = re.compile(r"([^|:]+?): ([-+.\dE]+|nan|[-+]?inf)", re.IGNORECASE)


@dataclass(frozen=True)
class Iteration:
    """An iteration line: means over the iterations since the line before."""

    number: int  # training steps taken
    total: int  # training steps of the whole run
    loss: float  # in nats, NaN where the steps were skipped
    milliseconds: float  # of a step
    sequences: int  # of a step
    recurrence_steps: float | None  # None for a system without recurrence


@dataclass(frozen=True)
class Validation:
    """A validation line."""

    iteration: int  # training steps before it
    loss: float  # in nats
    perplexity: float


@dataclass
class TrainingLog:
    """What a run says, in order, but for the test set."""

    iterations: list[Iteration] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    # Figures of evaluations by training steps before it, recurrence steps (0: none to choose) and name; of several at
    # the same place the last
    evaluations: dict[int, dict[int, dict[str, float]]] = field(default_factory=dict)


def read_iteration(line: str) -> Iteration | None:
    """Return what an iteration line says, None for any other line."""
    found = _ITERATION.search(line)
    milliseconds, sequences = _MILLISECONDS.search(line), _SEQUENCES.search(line)
    if not (found and milliseconds and sequences):
        return None
    loss, steps = _LOSS.search(line), _STEPS.search(line)
    return Iteration(
        number=int(found[1]),
        total=int(found[2]),
        loss=float(loss[1]) if loss else float("nan"),
        milliseconds=float(milliseconds[1]),
        sequences=int(sequences[1]),
        recurrence_steps=float(steps[1]) if steps else None,
    )


def read_validation(line: str) -> Validation | None:
    """Return what a validation line says, None for any other line."""
    found = _VALIDATION.search(line)
    return Validation(int(found[1]), float(found[2]), float(found[3])) if found else None


def read_log(lines: Iterable[str]) -> TrainingLog:
    """Return all that the lines of a run say."""
    log = TrainingLog()
    for line in lines:
        if iteration := read_iteration(line):
            log.iterations.append(iteration)
        if validation := read_validation(line):
            log.validations.append(validation)
        if found := _EVALUATION.search(line):
            figures = {name.strip(): float(value) for name, value in _FIGURE.findall(found[3])}
            log.evaluations.setdefault(int(found[1]), {})[int(found[2] or 0)] = figures
    return log
