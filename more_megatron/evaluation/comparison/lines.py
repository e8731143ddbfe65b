"""What the figures of a report with a line for each arm show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.measures import ArmResult, Spread, task_names

__all__ = ["Lines", "Points", "line_figures"]

Points = Mapping[float, Spread]


@dataclass(frozen=True)
class Lines:
    """A figure with a line for each arm.

    Attributes:
        name: Its name in a folder.
        title: What it shows.
        x: What stands below.
        y: What stands at the side.
        points_of: Returns the points of an arm; none where it has none.
        note: How to read it.
        level_of: Returns the level of an arm without points, where that says something.
        is_falling: Whether lines fall from far above, the same for all, which is left out of sight. Others have bars of
            deviation, since their points are few.
        is_doubled: Whether each x is twice the one before.
        is_share: Whether y begins at 0.
    """

    name: str
    title: str
    x: str
    y: str
    points_of: Callable[[ArmResult], Points]
    note: str
    level_of: Callable[[ArmResult], Spread | None] | None = None
    is_falling: bool = False
    is_doubled: bool = False
    is_share: bool = False


def line_figures(arms: Sequence[ArmResult]) -> Iterator[Lines]:
    """Yield the figures, those of answers as far as some arm has such."""
    yield from _LOSSES
    yield from _answers_by_depth(arms)
    yield from _answers_by_difficulty(arms)
    yield from _ENTROPIES


def _by_step(series: Sequence[Mapping[int, float]], unit: float) -> dict[float, Spread]:
    """Return what seeds have at each training step that all of them have, by some unit of steps."""
    shared = set.intersection(*(set(one) for one in series)) if series else set()
    return {step * unit: Spread.of([one[step] for one in series]) for step in sorted(shared)}


def _curves(arm: ArmResult) -> Points:
    return _by_step([run.curve for run in arm.finished], arm.step_tokens)


def _against_flops(arm: ArmResult) -> Points:
    return _by_step([run.validations for run in arm.finished], arm.step_tokens * arm.arm.flops)


def _against_depth(arm: ArmResult) -> Points:
    return {depth: loss for depth in arm.depths if (loss := arm.loss_at(depth)) is not None}


def _answers(arm: ArmResult, measure: str) -> Points:
    depths = sorted({depth for run in arm.finished for depth in run.answers})
    return {depth: each for depth in depths if depth and (each := arm.answers_at(depth, measure)) is not None}


def _answers_by_depth(arms: Sequence[ArmResult]) -> Iterator[Lines]:
    """Yield a figure for each task: exact match against depth."""
    names = {name for arm in arms for run in arm.finished for at in run.answers.values() for name in at}
    for measure in sorted(name for name in names if name.endswith("exact match")):
        yield Lines(
            measure.replace(" ", "-"),
            f"{measure.removesuffix(' exact match')}: exact match against depth",
            "recurrence steps r in evaluation",
            "share of problems",
            functools.partial(_answers, measure=measure),
            "Bars: one standard deviation. Without recurrence: a dotted level.",
            level_of=functools.partial(ArmResult.answers_at, depth=0, figure=measure),
            is_doubled=True,
            is_share=True,
        )


def _answers_by_difficulty(arms: Sequence[ArmResult]) -> Iterator[Lines]:
    """Yield a figure for each task of several difficulties: exact match against difficulty."""
    for task in task_names(arms):
        by_difficulty = [arm.by_difficulty(task) for arm in arms]
        if any(len(each) > 1 for each in by_difficulty):
            yield Lines(
                f"{task}-difficulty",
                f"{task}: exact match against difficulty",
                "difficulty of the problem",
                "share of problems",
                functools.partial(ArmResult.by_difficulty, task=task),
                "Each arm at the depth nearest to its mean in training; bars: one standard deviation.",
                is_share=True,
            )


_LOSSES = (
    Lines(
        "curves",
        "Training loss",
        "training tokens",
        "nats a token",
        _curves,
        "Mean over the seeds of what was logged.",
        is_falling=True,
    ),
    Lines(
        "flops",
        "Validation loss against training FLOPs",
        "training FLOPs",
        "nats a token",
        _against_flops,
        "Mean over the seeds. Each validation on the way reads other samples, the same for all arms.",
        is_falling=True,
    ),
    Lines(
        "depth",
        "Validation loss against depth",
        "recurrence steps r in evaluation",
        "nats a token",
        _against_depth,
        "The same weights at different r; bars: one standard deviation. Without recurrence: a dotted level. What lies "
        "far above the rest, or is not finite, leaves the picture.",
        level_of=lambda arm: arm.loss,
        is_doubled=True,
    ),
)
_ENTROPIES = (
    Lines(
        "entropy",
        "Routing entropy by training step",
        "training step",
        "in parts of ln N",
        health.entropy_over_training,
        "At 1 all N experts are as likely for every token. Mean over layers, recurrence steps and seeds.",
    ),
    Lines(
        "entropy-by-step",
        "Routing entropy by recurrence step",
        "recurrence step",
        "in parts of ln N",
        health.entropy_by_step,
        "Mean over layers and seeds at the last training step that was watched; bars: one standard deviation. Routers "
        "that are asked once: a dotted level.",
        level_of=health.entropy_level,
    ),
)
