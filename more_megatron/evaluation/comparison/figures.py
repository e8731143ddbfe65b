"""The figures of a report: what each shows, and how it is to be read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.drawing import Drawing, Drawn, Points
from more_megatron.evaluation.comparison.measures import ArmResult, Spread
from more_megatron.evaluation.comparison.timing import Timing

__all__ = ["draw_all"]

_EXACT_MATCH = " exact match"
_DEPTH = "recurrence steps r in evaluation"


def draw_all(arms: Sequence[ArmResult], timings: Sequence[Timing], matched: str) -> list[Drawn]:
    """Return the figures that there are figures for, of the arms of one point of the sweep."""
    drawing = Drawing(arms, matched)
    _draw_losses(drawing)
    _draw_answers(drawing, arms)
    _draw_routing(drawing)
    speeds = {timing.arm: timing.achieved_flops / 1e9 for timing in timings}
    drawing.bars("Speed", "GFLOP/s", speeds, "Forward and backward passes, timed in turn.")
    return drawing.figures


def _draw_losses(drawing: Drawing) -> None:
    nats = "nats a token"
    drawing.lines(
        "Training loss",
        ("training tokens", nats),
        lambda arm: _shared(arm, "curve", arm.step_tokens),
        "Mean over the seeds of what was logged.",
        is_falling=True,
    )
    drawing.lines(
        "Validation loss against training FLOPs",
        ("training FLOPs", nats),
        lambda arm: _shared(arm, "validations", arm.step_tokens * arm.arm.flops),
        "Mean over the seeds. Each validation on the way reads other samples, the same for all arms.",
        is_falling=True,
    )
    drawing.lines(
        "Validation loss against depth",
        (_DEPTH, nats),
        lambda arm: arm.loss_at,
        "The same weights at different r; bars: one standard deviation. Without recurrence: a dotted level. What lies "
        "far above the rest, or is not finite, leaves the picture.",
        level_of=lambda arm: arm.loss,
        is_doubled=True,
    )


def _shared(arm: ArmResult, series: str, unit: float) -> Points:
    """Return what seeds have at each training step that all of them have, by some unit of steps."""
    found: list[Any] = [getattr(run, series) for run in arm.finished]
    steps = set.intersection(*map(set, found)) if found else set()
    return {step * unit: Spread.of([one[step] for one in found]) for step in sorted(steps)}


def _draw_answers(drawing: Drawing, arms: Sequence[ArmResult]) -> None:
    """Draw the exact match of each task against depth, and of those with several difficulties against difficulty."""
    share = "share of problems"
    for name in sorted({name for arm in arms for name in arm.answer_names if name.endswith(_EXACT_MATCH)}):
        drawing.lines(
            f"{name.removesuffix(_EXACT_MATCH)}: exact match against depth",
            (_DEPTH, share),
            functools.partial(_chosen_depths, name=name),
            "Bars: one standard deviation. Without recurrence: a dotted level.",
            level_of=functools.partial(_without_depth, name=name),
            is_doubled=True,
            is_share=True,
        )
    for task in sorted({task for arm in arms for task in arm.tasks}):
        if any(len(arm.by_difficulty(task)) > 1 for arm in arms):
            drawing.lines(
                f"{task}: exact match against difficulty",
                ("difficulty of the problem", share),
                functools.partial(ArmResult.by_difficulty, task=task),
                "Each arm at the depth nearest to its mean in training; bars: one standard deviation.",
                is_share=True,
            )


def _chosen_depths(arm: ArmResult, name: str) -> Points:
    return {depth: spread for depth, spread in arm.answers_at(name).items() if depth}


def _without_depth(arm: ArmResult, name: str) -> Spread | None:
    return arm.answers_at(name).get(0)


def _draw_routing(drawing: Drawing) -> None:
    part = "in parts of ln N"
    drawing.lines(
        "Routing entropy by training step",
        ("training step", part),
        health.entropy_over_training,
        "At 1 all N experts are as likely for every token. Mean over layers, recurrence steps and seeds.",
    )
    drawing.lines(
        "Routing entropy by recurrence step",
        ("recurrence step", part),
        health.entropy_by_step,
        "Mean over layers and seeds at the last training step that was watched; bars: one standard deviation. Routers "
        "that are asked once: a dotted level.",
        level_of=health.entropy_level,
    )
    drawing.loads(
        "Expert load by recurrence step",
        health.loads,
        "Share of the choices of routers, mean over layers and seeds, at the last training step that was watched. "
        "Steps: of the recurrence, as many as were drawn there.",
    )
