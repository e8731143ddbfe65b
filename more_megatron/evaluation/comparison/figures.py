"""The figures of a report, each an SVG small enough for a phone, with the seeds and what was matched in its caption.

A colour and a line style are those of an arm throughout.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from more_megatron.evaluation.comparison.measures import ArmResult, Spread, health_series
from more_megatron.evaluation.comparison.timing import Timing
from more_megatron.evaluation.figures import new_figure

__all__ = ["Drawn", "draw_all"]

_INCHES = (5.6, 4.2)
_MANY = 1e4
_STYLES = ("-", "--", ":", "-.")
Points = Sequence[tuple[float, float]]


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
    seeds = sorted({arm.loss.count for arm in arms if arm.loss is not None})
    counted = f"{' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''} an arm; matched: {matched}"
    draw = _Draw(arms, counted)
    yield from draw.lines(
        "curves",
        "Training loss",
        "training tokens",
        "nats a token",
        _curves,
        "Mean over the seeds of what was logged.",
    )
    yield from draw.lines(
        "flops",
        "Validation loss against training FLOPs",
        "training FLOPs",
        "nats a token",
        _against_flops,
        "Mean over the seeds. Each validation on the way reads other samples, the same for all arms.",
    )
    yield from draw.lines(
        "depth",
        "Validation loss against depth",
        "recurrence steps r in evaluation",
        "nats a token",
        _against_depth,
        "The same weights at different r; bars: one standard deviation. Without recurrence: a dotted level.",
        by_depth=True,
    )
    yield from draw.answers()
    for name, title, unit in (
        ("entropy", "Routing entropy", "nats"),
        ("load cv", "Variation of expert load", "deviation over mean"),
    ):
        yield from draw.lines(
            name.replace(" ", "-"),
            f"{title} by training step",
            "training step",
            unit,
            functools.partial(health_series, figure=name),
            "Mean over layers, recurrence steps and seeds.",
        )
    yield from draw.bars(
        "speed", "Speed", "GFLOP/s", {timing.arm: timing.achieved_flops / 1e9 for timing in timings}, "Timed in turn."
    )


class _Draw:
    """Draws with what figures of a report have in common.

    Args:
        arms: The arms.
        counted: Seeds and matching, in words.
    """

    def __init__(self, arms: Sequence[ArmResult], counted: str) -> None:
        self._arms, self._counted = arms, counted

    def lines(
        self,
        name: str,
        title: str,
        x: str,
        y: str,
        points_of: Callable[[ArmResult], Points],
        note: str,
        by_depth: bool = False,
    ) -> Iterator[Drawn]:
        """Yield a figure with a line for each arm that has points; none if none has."""
        points = {arm.arm.name: points_of(arm) for arm in self._arms}
        if not any(len(each) > 0 for each in points.values()):
            return
        from matplotlib.ticker import EngFormatter

        figure, axes = _new()
        for number, arm in enumerate(self._arms):
            style: dict[str, Any] = {"color": _colour(number), "label": arm.arm.name, "linewidth": 1.4}
            if each := points[arm.arm.name]:
                axes.plot(*zip(*each, strict=True), _STYLES[number // 10 % 4], marker=".", markersize=3, **style)
            elif by_depth and arm.loss is not None:
                axes.axhline(arm.loss.mean, linestyle=":", **style)
            if by_depth:
                _error_bars(axes, arm, _colour(number))
        if by_depth:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
        elif max(at for each in points.values() for at, _ in each) > _MANY:
            axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _focus(axes, points.values())
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        yield self._drawn(figure, name, title, note)

    def answers(self) -> Iterator[Drawn]:
        """Yield a figure for each task: exact match against depth."""
        names = {name for arm in self._arms for run in arm.finished for at in run.answers.values() for name in at}
        for measure in sorted(name for name in names if name.endswith("exact match")):
            yield from self.lines(
                measure.replace(" ", "-"),
                f"{measure.removesuffix(' exact match')}: exact match against depth",
                "recurrence steps r in evaluation",
                "share of problems",
                functools.partial(_answers, measure=measure),
                "Answers whose every token was the most probable one after those before it. At 0: no depth to choose.",
            )

    def bars(self, name: str, title: str, unit: str, values: Mapping[str, float], note: str) -> Iterator[Drawn]:
        """Yield a figure with a bar for each arm that has a value."""
        if not values:
            return
        figure, axes = _new()
        places = {arm.arm.name: number for number, arm in enumerate(self._arms)}
        axes.barh(list(values), list(values.values()), color=[_colour(places[arm]) for arm in values])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        yield self._drawn(figure, name, title, note)

    def _drawn(self, figure: Any, name: str, title: str, note: str) -> Drawn:
        figure.suptitle(title, fontsize=11)
        buffer = io.BytesIO()
        # Letters as outlines look the same wherever the report is read.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return Drawn(name, title, f"{note} {self._counted}.", uri)


def _new() -> tuple[Any, Any]:
    figure = new_figure(*_INCHES)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)


def _focus(axes: Any, lines: Any) -> None:
    """Leave out of sight where curves fall from, which is the same for all and would flatten what differs."""
    values = [y for points in lines for _, y in points if math.isfinite(y)]
    lasts = [points[-1][1] for points in lines if len(points) > 0]
    low, high = min(values), max(values)
    if lasts and high > max(lasts):
        axes.set_ylim(top=max(lasts) + max(0.3 * (high - max(lasts)), 0.1 * (high - low)))


def _error_bars(axes: Any, arm: ArmResult, colour: Any) -> None:
    spreads = {depth: arm.loss_at(depth) for depth in arm.depths}
    known = {depth: each for depth, each in spreads.items() if each is not None and not math.isnan(each.deviation)}
    axes.errorbar(
        list(known),
        [each.mean for each in known.values()],
        yerr=[each.deviation for each in known.values()],
        fmt="none",
        ecolor=colour,
        capsize=2,
        linewidth=0.8,
    )


def _mean_by_key(series: Sequence[Mapping[int, float]]) -> list[tuple[int, float]]:
    """Return the mean over the seeds at each step that all of them have."""
    shared = set.intersection(*(set(one) for one in series)) if series else set()
    return [(key, statistics.fmean(one[key] for one in series)) for key in sorted(shared)]


def _curves(arm: ArmResult) -> Points:
    means = _mean_by_key([run.curve for run in arm.finished])
    return [(step * arm.arm.tokens / arm.steps, loss) for step, loss in means]


def _against_flops(arm: ArmResult) -> Points:
    means = _mean_by_key([run.validations for run in arm.finished])
    return [(step * arm.arm.tokens / arm.steps * arm.arm.flops, loss) for step, loss in means]


def _against_depth(arm: ArmResult) -> Points:
    spreads: list[tuple[int, Spread | None]] = [(depth, arm.loss_at(depth)) for depth in arm.depths]
    return [(depth, spread.mean) for depth, spread in spreads if spread is not None]


def _answers(arm: ArmResult, measure: str) -> Points:
    depths = sorted({depth for run in arm.finished for depth in run.answers})
    spreads = [(depth, arm.answers_at(depth, measure)) for depth in depths]
    return [(depth, spread.mean) for depth, spread in spreads if spread is not None]
