"""The health of a training run on one page, from the `health.jsonl` in its `--save` folder."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.figures import draw_loads, name_axes, panels, spread, write_results
from more_megatron.json_lines import read_json_lines
from more_megatron.monitoring import HEALTH_FILE

_FIELDS = ("iteration", "figures", "experts", "warnings")
_MOST_LINES, _MOST_ROWS = 8, 24

Record = Mapping[str, Any]
# What draws on axes of matplotlib; None where there is nothing to draw.
Panel = Callable[[Any], None] | None
# Values by name, and by iteration or recurrence step; None where there are none.
Lines = dict[str, dict[int, float | None]]


def read_health(folder: Path) -> list[Record]:
    """Return the records of a run, one for each iteration that was watched: the last where it was resumed.

    Raises:
        MoREError: If the file is missing, empty or damaged.
    """
    path = folder / HEALTH_FILE
    if not path.is_file():
        raise MoREError(
            f"--run {folder} has no {HEALTH_FILE}: give a run's --save folder, and train with --health-interval N"
        )
    lines = read_json_lines(path, "remove the line, or wait for a step that is watched", _FIELDS).values()
    records = {line["iteration"]: line for line in lines}
    return [records[iteration] for iteration in sorted(records)]


def split_tag(tag: str) -> tuple[str, int]:
    """Return a figure's tag without its recurrence step, and the step, 0 where there is none."""
    name, _, step = tag.partition("/step ")
    return name, int(step or 0)


def warned_figure(warning: str) -> str:
    """Return the figure that a warning is about."""
    return "not finite" if "not finite" in warning else warning.split(" is ")[0]


def draw_health(folder: Path, output: Path) -> list[str]:
    """Draw all that is known of a run's health, and return lines that say where, and what was warned of.

    Raises:
        MoREError: As `read_health`, which reads the run's `--save` folder.
    """
    records = read_health(folder)
    drawn = [panel for panel in _panels(records) if panel is not None]
    figure, axes = panels(len(drawn), 3, size=(5.0, 3.3))
    for axis, draw in zip(axes, drawn, strict=True):
        draw(axis)
    warned = [(record["iteration"], warning) for record in records for warning in record["warnings"]]
    figure.suptitle(f"Health of {folder.name}: {len(records)} steps watched, {len(warned)} warnings")
    lines = [f"iteration {iteration}: {warning}" for iteration, warning in warned[-20:]]
    return [*lines, write_results(output, {}, {"health.png": figure})]


def _panels(records: Sequence[Record]) -> list[Panel]:
    """Return all panels. Figures are named by patterns of their tags, without the recurrence step."""
    return [
        _over_time(records, "Loss", "nats", "loss/loss"),
        _over_time(records, "Gradient norm by kind", "norm", "gradient/(.+ )?norm", log=True),
        _warnings(records),
        _over_time(records, "Length of the last state", "length / root of h", "recurrence/.+/state norm"),
        _over_steps(records[-1], "Relative change by step", "recurrence/.+/relative change"),
        _over_time(records, "Correlation of tokens' states", "cosine", "recurrence/.+/token correlation"),
        _over_time(records, "Spectral norm of adapter halves", "norm", "recurrence/.+/adapter .+"),
        _over_time(records, "Entropy of routers", "nats", "routing/.+/entropy"),
        _over_time(records, "Variation of expert load", "cv of probability", "routing/.+/load cv"),
        _over_time(records, "Dead experts", "experts", "routing/.+/dead experts"),
        _over_time(records, "Tokens that change experts", "share", "routing/.+/expert change"),
        _loads(records[-1]),
        _over_time(records, "Figures of the system", "", "system/.+"),
        _over_time(records, "Validation loss by depth", "nats", "depth/loss"),
    ]


def _over_time(records: Sequence[Record], title: str, unit: str, pattern: str, log: bool = False) -> Panel:
    """Return what draws figures over the iterations: of those with steps the last, but for losses at chosen depths."""
    lines: Lines = {}
    iterations = [record["iteration"] for record in records]
    for record in records:
        for (name, step), value in sorted((split_tag(tag), value) for tag, value in record["figures"].items()):
            if re.fullmatch(pattern, name):
                line = f"{name}/step {step}" if name.startswith("depth/") else name
                lines.setdefault(line, dict.fromkeys(iterations))[record["iteration"]] = value
    return _lines(lines, title, "iteration", unit, log)


def _over_steps(record: Record, title: str, pattern: str) -> Panel:
    """Return what draws a figure over the recurrence steps, a line for each place."""
    lines: Lines = {}
    for (name, step), value in sorted((split_tag(tag), value) for tag, value in record["figures"].items()):
        if step and value is not None and re.fullmatch(pattern, name):
            lines.setdefault(name, {})[step] = value
    title = f"{title}, iteration {record['iteration']}"
    return _lines(lines, title, "recurrence step", "length of the change / of the state")


def _lines(lines: Lines, title: str, x: str, y: str, log: bool = False) -> Panel:
    """Return what draws some of the lines, spread over all; None if there are none."""
    names = spread(_in_order(lines), _MOST_LINES)
    if not names:
        return None

    def draw(axis: Any) -> None:
        for name in names:
            places, values = zip(*lines[name].items(), strict=True)
            axis.plot(places, values, "o-", markersize=2.5, linewidth=1, label=_label(name))
        name_axes(axis, title, x, y)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if log:
            axis.set_yscale("log")
        if len(names) > 1:
            axis.legend(fontsize=6, ncols=2 if len(names) > 4 else 1, framealpha=0.6)

    return draw


def _warnings(records: Sequence[Record]) -> Panel:
    """Return what draws when which figure lay outside of its range."""
    names = sorted({warned_figure(warning) for record in records for warning in record["warnings"]})
    if not names:
        return None

    def draw(axis: Any) -> None:
        for row, name in enumerate(names):
            at = [record["iteration"] for record in records if name in map(warned_figure, record["warnings"])]
            axis.plot(at, [row] * len(at), "s", color="#b2182b", markersize=4)
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.set_xlim(0, 1.03 * records[-1]["iteration"])
        axis.invert_yaxis()
        name_axes(axis, "Warnings", "iteration")
        axis.set_yticks(range(len(names)), names, fontsize=7)

    return draw


def _loads(record: Record) -> Panel:
    """Return what draws the load of each expert, in parts of the mean; a row for some layers and steps."""
    tags = spread(_in_order(record["experts"]), _MOST_ROWS)
    if not tags:
        return None

    def draw(axis: Any) -> None:
        draw_loads(axis, {_label(tag): record["experts"][tag]["load"] for tag in tags})
        axis.set_title(f"Load of experts, iteration {record['iteration']}", fontsize=10)
        axis.tick_params(axis="y", labelsize=6)

    return draw


def _in_order(tags: Any) -> list[str]:
    return sorted(tags, key=lambda tag: (len(tag), tag))


def _label(tag: str) -> str:
    concern, *place = tag.split("/")
    words = place or [concern]
    if len(words) > 1 and concern not in ("depth", "system") and "adapter" not in tag:
        words = [words[0], *words[2:]]
    if concern == "gradient":
        return {"norm": "all", "mean norm": "all, mean of 1,000 steps"}.get(words[0], words[0].removesuffix(" norm"))
    return ", ".join(words)
