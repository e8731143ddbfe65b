"""The figures of a report: what each shows, how it is to be read, and the picture, an SVG small enough for a phone.

A colour and a line style are those of an arm throughout.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.measures import ArmResult, Spread
from more_megatron.figures import depth_axis, draw_loads, new_figure

_INCHES = (4.8, 3.9)
_MANY = 1e4
_STYLES = ("-", "--", ":", "-.")
_EXACT_MATCH = " exact match"
_DEPTH, _NATS = "recurrence steps r in evaluation", "nats a token"
_SHARE, _ENTROPY = "share of problems", "in parts of ln N"

Points = Mapping[int, Spread] | Mapping[float, Spread]


@dataclass(frozen=True)
class Drawn:
    """A figure: what it shows, how to read it, and the picture, an SVG as a data URI."""

    title: str
    caption: str
    uri: str


def draw_all(arms: Sequence[ArmResult], matched: str) -> list[Drawn]:
    """Return the figures that there are figures for.

    Args:
        arms: Those of one point of the sweep.
        matched: What was matched, in words.
    """
    drawing = _Drawing(arms, matched)
    _draw_losses(drawing)
    _draw_answers(drawing)
    _draw_routing(drawing)
    return drawing.figures


def _draw_losses(drawing: _Drawing) -> None:
    arms = drawing.arms
    drawing.lines(
        "Training loss",
        ("training tokens", _NATS),
        [_shared(arm, "curve", arm.step_tokens) for arm in arms],
        "Mean over the seeds of what was logged.",
        is_falling=True,
    )
    drawing.lines(
        "Validation loss against training FLOPs",
        ("training FLOPs", _NATS),
        [_shared(arm, "validations", arm.step_tokens * arm.arm.flops) for arm in arms],
        "Mean over the seeds. Each validation on the way reads other samples, the same for all arms.",
        is_falling=True,
    )
    drawing.lines(
        "Validation loss against depth",
        (_DEPTH, _NATS),
        [arm.loss_at for arm in arms],
        "The same weights at different r; bars: one standard deviation. Without recurrence: a dotted level. What lies "
        "far above the rest, or is not finite, leaves the picture.",
        levels=[arm.loss for arm in arms],
    )


def _shared(arm: ArmResult, series: str, unit: float) -> Points:
    """Return what seeds have at each training step that all of them have, by some unit of steps."""
    found: list[Any] = [getattr(run, series) for run in arm.finished]
    steps = set.intersection(*map(set, found)) if found else set()
    return {step * unit: Spread.of([one[step] for one in found]) for step in sorted(steps)}


def _draw_answers(drawing: _Drawing) -> None:
    """Draw the exact match of each task against depth, and of those with several difficulties against difficulty."""
    arms = drawing.arms
    for name in sorted({name for arm in arms for name in arm.answers if name.endswith(_EXACT_MATCH)}):
        answers = [arm.answers.get(name, {}) for arm in arms]
        drawing.lines(
            f"{name.removesuffix(_EXACT_MATCH)}: exact match against depth",
            (_DEPTH, _SHARE),
            [{depth: spread for depth, spread in each.items() if depth} for each in answers],
            "Bars: one standard deviation. Without recurrence: a dotted level.",
            levels=[each.get(0) for each in answers],
        )
    for task in sorted({task for arm in arms for task in arm.by_difficulty}):
        found = [arm.by_difficulty.get(task, {}) for arm in arms]
        if any(len(difficulties) > 1 for difficulties in found):
            drawing.lines(
                f"{task}: exact match against difficulty",
                ("difficulty of the problem", _SHARE),
                found,
                "Each arm at the depth nearest to its mean in training; bars: one standard deviation.",
            )


def _draw_routing(drawing: _Drawing) -> None:
    over_training = [health.entropy_over_training(arm) for arm in drawing.arms]
    by_step = [health.entropy_by_step(arm) for arm in drawing.arms]
    drawing.lines(
        "Routing entropy by training step",
        ("training step", _ENTROPY),
        over_training,
        "At 1 all N experts are as likely for every token. Mean over layers, recurrence steps and seeds.",
    )
    drawing.lines(
        "Routing entropy by recurrence step",
        ("recurrence step", _ENTROPY),
        by_step,
        "Mean over layers and seeds at the last training step that was watched; bars: one standard deviation. Routers "
        "that are asked once: a dotted level.",
        levels=[next(reversed(entropies.values()), None) for entropies in over_training],
    )
    drawing.loads()


class _Drawing:
    """The figures of a report that were drawn so far, each with the seeds and what was matched in its caption."""

    def __init__(self, arms: Sequence[ArmResult], matched: str) -> None:
        self.arms, self._matched = arms, matched
        self.figures: list[Drawn] = []

    def lines(
        self,
        title: str,
        labels: tuple[str, str],
        points: Sequence[Points],
        note: str,
        levels: Sequence[Spread | None] = (),
        is_falling: bool = False,
    ) -> None:
        """Draw a line for each arm that has points, or else its level; nothing if none has points.

        Lines that fall from far above, the same for all, are seen from where they differ. Others have bars of
        deviation, since their points are few.
        """
        if not any(points):
            return
        figure = new_figure(*_INCHES)
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for number, (arm, each) in enumerate(zip(self.arms, points, strict=True)):
            style: dict[str, Any] = {"color": f"C{number % 10}", "label": arm.arm.name, "linewidth": 1.4}
            if each:
                means = [spread.mean for spread in each.values()]
                bars = None if is_falling else [spread.deviation for spread in each.values()]
                shape = {"fmt": _STYLES[number // 10 % 4], "marker": ".", "markersize": 3}
                axes.errorbar(list(each), means, bars, **shape, **style, capsize=2, elinewidth=0.8)
            elif levels and (level := levels[number]) is not None:
                axes.axhline(level.mean, linestyle=":", **style)
        _scale(axes, labels[0], [x for each in points for x in each])
        if labels[1] == _SHARE:
            axes.set_ylim(bottom=0.0)
        else:
            _focus(axes, [[spread.mean for spread in each.values()] for each in points], is_falling)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        self._add(figure, title, note, {spread.count for each in points for spread in each.values()})

    def loads(self) -> None:
        """Draw the load of experts as colours, a row for each arm and recurrence step; nothing without experts."""
        found = [(arm, health.loads(arm)) for arm in self.arms]
        rows = {
            f"{arm.arm.name}, step {step}" if step else arm.arm.name: load
            for arm, by_step in found
            for step, load in by_step.items()
        }
        if not rows:
            return
        figure = new_figure(_INCHES[0], 1.6 + 0.2 * len(rows))
        axes = figure.subplots()
        draw_loads(axes, rows, range(1, max(map(len, rows.values())) + 1))
        axes.set_xlabel("experts of a layer, the most loaded one first")
        note = (
            "Share of the choices of routers, mean over layers and seeds, at the last training step that was watched. "
            "Steps: of the recurrence, as many as were drawn there."
        )
        self._add(figure, "Expert load by recurrence step", note, {len(arm.watched) for arm, each in found if each})

    def _add(self, figure: Any, title: str, note: str, counts: set[int]) -> None:
        figure.suptitle(title, fontsize=11)
        buffer = io.BytesIO()
        # Letters as outlines look the same wherever the report is read.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        fewest, most = min(counts), max(counts)
        seeds = f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' if counts != {1} else ''}"
        self.figures.append(Drawn(title, f"{note} Of each arm {seeds}; matched: {self._matched}.", uri))


def _scale(axes: Any, label: str, places: Sequence[Any]) -> None:
    """Let the axis below have ticks that suit its values."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if label == _DEPTH:
        depth_axis(axes, sorted(set(places)))
    elif max(places) > _MANY:
        axes.xaxis.set_major_formatter(EngFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _focus(axes: Any, lines: Sequence[Sequence[float]], is_falling: bool) -> None:
    """Leave out of sight what lies far above the rest, and would flatten what differs there.

    That is where all lines fall from, above the last of each; of others what is beyond three interquartile ranges.
    """
    lines = [[y for y in line if math.isfinite(y)] for line in lines]
    lines = [line for line in lines if line]
    values = [y for line in lines for y in line]
    if not values:
        return
    low, high, last = min(values), max(values), max(line[-1] for line in lines)
    first, third = np.percentile(values, (25, 75))
    falling = last + max(0.3 * (high - last), 0.1 * (high - low))
    top = falling if is_falling else third + 3 * (third - first)
    if low < top < high:
        axes.set_ylim(low - 0.3 * (top - low), top)
