"""The figures of a report, each an SVG small enough for a phone, with the seeds and what was matched in its caption.

A colour and a line style are those of an arm throughout.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.lines import Lines, Points, line_figures
from more_megatron.evaluation.comparison.measures import ArmResult
from more_megatron.evaluation.comparison.timing import Timing
from more_megatron.figures import draw_loads, new_figure

__all__ = ["Drawn", "draw_all"]

_INCHES = (4.8, 3.9)
_MANY = 1e4
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: Its name in a folder.
        title: What it shows.
        caption: How many seeds, what was matched, and how to read it.
        uri: The picture, an SVG as a data URI.
    """

    name: str
    title: str
    caption: str
    uri: str


def draw_all(arms: Sequence[ArmResult], timings: Sequence[Timing], matched: str) -> Iterator[Drawn]:
    """Yield the figures that there are figures for.

    Args:
        arms: The arms of one point of the sweep.
        timings: How fast they are.
        matched: What was matched, in words.
    """
    draw = _Draw(arms, matched)
    for lines in line_figures(arms):
        yield from draw.lines(lines)
    yield from draw.loads()
    yield from draw.speed(timings)


class _Draw:
    """Draws with what figures of a report have in common.

    Args:
        arms: The arms.
        matched: What was matched, in words.
    """

    def __init__(self, arms: Sequence[ArmResult], matched: str) -> None:
        self._arms, self._matched = arms, matched

    def lines(self, lines: Lines) -> Iterator[Drawn]:
        """Yield a figure with a line for each arm that has points; none if none has."""
        points = [lines.points_of(arm) for arm in self._arms]
        if not any(points):
            return
        figure, axes = _new()
        for number, (arm, each) in enumerate(zip(self._arms, points, strict=True)):
            style: dict[str, Any] = {"color": _colour(number), "label": arm.arm.name, "linewidth": 1.4}
            means = [spread.mean for spread in each.values()]
            if each:
                axes.plot(list(each), means, _STYLES[number // 10 % 4], marker=".", markersize=3, **style)
            elif lines.level_of is not None and (level := lines.level_of(arm)) is not None:
                axes.axhline(level.mean, linestyle=":", **style)
            if not lines.is_falling:
                _error_bars(axes, each, _colour(number))
        _scale(axes, [x for each in points for x in each], lines.is_doubled)
        if lines.is_share:
            axes.set_ylim(bottom=0.0)
        else:
            _focus(axes, [[spread.mean for spread in each.values()] for each in points], lines.is_falling)
        axes.set_xlabel(lines.x)
        axes.set_ylabel(lines.y)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        counts = {spread.count for each in points for spread in each.values()}
        yield self._drawn(figure, lines.name, lines.title, lines.note, counts)

    def loads(self) -> Iterator[Drawn]:
        """Yield a heat map of the load of experts, a row for each arm and recurrence step; none without experts."""
        found = [(arm, health.loads(arm)) for arm in self._arms]
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
        counts = {sum(bool(run.health) for run in arm.finished) for arm, by_step in found if by_step}
        yield self._drawn(figure, "load-by-step", "Expert load by recurrence step", note, counts)

    def speed(self, timings: Sequence[Timing]) -> Iterator[Drawn]:
        """Yield a figure with a bar for each arm that was timed; none if none was."""
        if not timings:
            return
        figure, axes = _new()
        places = {arm.arm.name: number for number, arm in enumerate(self._arms)}
        axes.barh(
            [timing.arm for timing in timings],
            [timing.achieved_flops / 1e9 for timing in timings],
            color=[_colour(places[timing.arm]) for timing in timings],
        )
        axes.invert_yaxis()
        axes.set_xlabel("GFLOP/s")
        yield self._drawn(figure, "speed", "Speed", "Forward and backward passes, timed in turn.", {1})

    def _drawn(self, figure: Any, name: str, title: str, note: str, counts: set[int]) -> Drawn:
        figure.suptitle(title, fontsize=11)
        buffer = io.BytesIO()
        # Letters as outlines look the same wherever the report is read.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        seeds = f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seed{'s' if counts != {1} else ''}"
        return Drawn(name, title, f"{note} Of each arm {seeds}; matched: {self._matched}.", uri)


def _new() -> tuple[Any, Any]:
    figure = new_figure(*_INCHES)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)


def _scale(axes: Any, places: Sequence[float], is_doubled: bool) -> None:
    """Let the axis below have ticks that suit its values."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if is_doubled:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    elif max(places) > _MANY:
        axes.xaxis.set_major_formatter(EngFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _focus(axes: Any, lines: Sequence[Sequence[float]], is_falling: bool) -> None:
    """Leave out of sight what lies far above the rest, and would flatten what differs there.

    Args:
        axes: Where lines are drawn.
        lines: Their values.
        is_falling: Whether that is where all lines fall from, above the last of each; else what is beyond three times
            the interquartile range.
    """
    lines = [finite for line in lines if (finite := [y for y in line if math.isfinite(y)])]
    values = [y for line in lines for y in line]
    if not values:
        return
    low, high, last = min(values), max(values), max(line[-1] for line in lines)
    first, third = np.percentile(values, (25, 75))
    falling = last + max(0.3 * (high - last), 0.1 * (high - low))
    top = falling if is_falling else third + 3 * (third - first)
    if low < top < high:
        axes.set_ylim(low - 0.3 * (top - low), top)


def _error_bars(axes: Any, points: Points, colour: Any) -> None:
    known = {x: each for x, each in points.items() if not math.isnan(each.deviation)}
    axes.errorbar(
        list(known),
        [each.mean for each in known.values()],
        yerr=[each.deviation for each in known.values()],
        fmt="none",
        ecolor=colour,
        capsize=2,
        linewidth=0.8,
    )
