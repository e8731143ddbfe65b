"""How the figures of a report are drawn: each an SVG small enough for a phone.

A colour and a line style are those of an arm throughout.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from more_megatron.evaluation.comparison.measures import ArmResult, Spread
from more_megatron.figures import draw_loads, new_figure

__all__ = ["Drawing", "Drawn", "Points"]

_INCHES = (4.8, 3.9)
_MANY = 1e4
_STYLES = ("-", "--", ":", "-.")

Points = Mapping[int, Spread] | Mapping[float, Spread]


@dataclass(frozen=True)
class Drawn:
    """A figure: what it shows, how to read it, and the picture, an SVG as a data URI."""

    title: str
    caption: str
    uri: str


@dataclass
class Drawing:
    """The figures of a report, each with the seeds and what was matched in its caption."""

    arms: Sequence[ArmResult]  # of one point of the sweep
    matched: str  # what was matched, in words
    figures: list[Drawn] = field(default_factory=list)  # what was drawn so far

    def lines(
        self,
        title: str,
        axes_labels: tuple[str, str],
        points_of: Callable[[ArmResult], Points],
        note: str,
        *,
        level_of: Callable[[ArmResult], Spread | None] = lambda arm: None,
        is_falling: bool = False,
        is_doubled: bool = False,
        is_share: bool = False,
    ) -> None:
        """Draw a line for each arm that has points; nothing if none has.

        Args:
            title: What it shows.
            axes_labels: What stands below and at the side.
            points_of: Returns the points of an arm; none where it has none.
            note: How to read it.
            level_of: Returns the level of an arm without points, where that says something.
            is_falling: Whether lines fall from far above, the same for all, which is left out of sight. Others have
                bars of deviation, since their points are few.
            is_doubled: Whether each x is twice the one before.
            is_share: Whether y begins at 0.
        """
        points = [points_of(arm) for arm in self.arms]
        if not any(points):
            return
        figure, axes = _new()
        for number, (arm, each) in enumerate(zip(self.arms, points, strict=True)):
            style: dict[str, Any] = {"color": _colour(number), "label": arm.arm.name, "linewidth": 1.4}
            if each:
                means = [spread.mean for spread in each.values()]
                axes.plot(list(each), means, _STYLES[number // 10 % 4], marker=".", markersize=3, **style)
            elif (level := level_of(arm)) is not None:
                axes.axhline(level.mean, linestyle=":", **style)
            if not is_falling:
                _error_bars(axes, each, _colour(number))
        _scale(axes, [x for each in points for x in each], is_doubled)
        if is_share:
            axes.set_ylim(bottom=0.0)
        else:
            _focus(axes, [[spread.mean for spread in each.values()] for each in points], is_falling)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        self._add(figure, title, note, {spread.count for each in points for spread in each.values()})

    def loads(self, title: str, loads_of: Callable[[ArmResult], Mapping[int, np.ndarray]], note: str) -> None:
        """Draw the load of experts as colours, a row for each arm and recurrence step; nothing without experts."""
        found = [(arm, loads_of(arm)) for arm in self.arms]
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
        self._add(figure, title, note, {len(arm.watched) for arm, by_step in found if by_step})

    def bars(self, title: str, label: str, values: Mapping[str, float], note: str) -> None:
        """Draw a bar for each arm that was measured once; nothing if none was."""
        if not values:
            return
        figure, axes = _new()
        places = {arm.arm.name: number for number, arm in enumerate(self.arms)}
        axes.barh(list(values), list(values.values()), color=[_colour(places[name]) for name in values])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        self._add(figure, title, note, {1})

    def _add(self, figure: Any, title: str, note: str, counts: set[int]) -> None:
        figure.suptitle(title, fontsize=11)
        buffer = io.BytesIO()
        # Letters as outlines look the same wherever the report is read.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        seeds = f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seed{'s' if counts != {1} else ''}"
        self.figures.append(Drawn(title, f"{note} Of each arm {seeds}; matched: {self.matched}.", uri))


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

    That is where all lines fall from, above the last of each; of others what is beyond three interquartile ranges.
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
