"""Results as JSON, as a table and as figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from more_megatron.figures import depth_axis, panels, write_results

# A task's accuracy is the first of these that it has.
_ACCURACIES = ("exact_match", "acc", "f1")
_NO_MEASURES = ("count", "tokens")
_PARTS_OF = "/"

Record = dict[str, Any]
# By task, measure and depth.
Values = dict[str, dict[str, dict[int | None, float]]]


def write_report(records: Sequence[Record], settings: dict[str, Any], folder: Path) -> list[str]:
    """Write `results.json`, `results.md` and figures of records, one a task and depth, under common settings.

    Returns:
        The table, and what was written, in lines.
    """
    depths = list(dict.fromkeys(record["num_steps"] for record in records))
    values = _values(records)
    table = _table(values, depths)
    results = [{key: value for key, value in record.items() if key != "settings"} for record in records]
    texts = {
        "results.json": json.dumps({"settings": settings, "results": results}, indent=1) + "\n",
        "results.md": f"# {settings['model']}\n\n{table}\n",
    }
    figures = {
        "depths.png": _draw_depths(values, depths),
        "difficulties.png": _draw_difficulties(records, depths),
    }
    skipped = {record["name"]: record.get("skipped", 0) for record in records}
    notes = [f"{name}: {count} problems are too long and left out" for name, count in skipped.items() if count]
    return [*table.splitlines(), "", *notes, write_results(folder, texts, figures)]


def _values(records: Sequence[Record]) -> Values:
    values: Values = {}
    for record in records:
        for entry, measures in record["measures"].items():
            for measure, value in measures.items():
                values.setdefault(entry, {}).setdefault(measure, {})[record["num_steps"]] = value
    return values


def _table(values: Values, depths: Sequence[int | None]) -> str:
    """Return a row for each task and measure, a column for each depth; of parts of a task only the accuracy."""
    heads = ["task", "n", "measure", *("value" if depth is None else f"r = {depth}" for depth in depths)]
    lines = [" | ".join(heads), " | ".join(["---", "---:", "---", *(["---:"] * len(depths))])]
    for entry, measures in values.items():
        count = next(iter(measures.get("count", {}).values()), None)
        accuracy = _first(measures, _ACCURACIES)
        for measure, by_depth in measures.items():
            is_shown = measure == accuracy if _PARTS_OF in entry else measure not in _NO_MEASURES
            if is_shown and "stderr" not in measure:
                cells = ["" if depth not in by_depth else _number(by_depth[depth]) for depth in depths]
                lines.append(" | ".join([entry, "" if count is None else f"{count:.0f}", measure, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _first(measures: dict[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of some measures that a task has, None if it has none."""
    return next((name for name in names if name in measures), None)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.4f}"


def _draw_depths(values: Values, depths: Sequence[int | None]) -> Any:
    """Draw accuracy and loss against depth; None if there is one depth only, or neither of them."""
    values = {entry: found for entry, found in values.items() if _PARTS_OF not in entry}
    steps = sorted(depth for depth in depths if depth is not None)
    shown = {"Accuracy": _ACCURACIES, "Loss in nats a token": ("loss",)}
    shown = {title: names for title, names in shown.items() if any(_first(each, names) for each in values.values())}
    if len(steps) < 2 or not shown:
        return None
    figure, axes = panels(len(shown), 2, size=(4.4, 3.6), margin=(1.5, 0.0))
    for axis, (title, names) in zip(axes, shown.items(), strict=True):
        for number, (entry, found) in enumerate(values.items()):
            if (measure := _first(found, names)) is not None:
                points = {depth: found[measure][depth] for depth in steps if depth in found[measure]}
                colour = f"C{number % 10}"
                axis.plot(list(points), list(points.values()), "o-", label=entry, color=colour, markersize=4)
        depth_axis(axis, steps)
        axis.grid(alpha=0.3)
        axis.set(xlabel="recurrence steps r", title=title)
        if names is _ACCURACIES:
            _accuracy_axis([axis])
    _legend(figure)
    return figure


def _accuracy_axis(axes: Sequence[Any]) -> None:
    """Let panels begin at 0 and be as high as the best of their lines needs, all alike."""
    best = max(float(np.max(line.get_ydata())) for axis in axes for line in axis.lines)
    top = min(1.0, max(0.1, 1.25 * best))
    for axis in axes:
        axis.set_ylim(-0.02 * top, 1.02 * top)


def _legend(figure: Any) -> None:
    """Name all lines once, beside the panels."""
    named: dict[str, Any] = {}
    for line in (line for axis in figure.axes for line in axis.lines):
        named.setdefault(line.get_label(), line)
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8, frameon=False)


def _draw_difficulties(records: Sequence[Record], depths: Sequence[int | None]) -> Any:
    """Draw the accuracy of answers against their difficulty, a line for each depth; None if nothing has several."""
    lines: dict[str, dict[int | None, dict[int, float]]] = {}
    for record in records:
        tasks = record.get("by_difficulty", {})
        for task, by_difficulty in tasks.items():
            if len(by_difficulty) > 1:
                title = record["name"] if len(tasks) == 1 else f"{record['name']}/{task}"
                found = {int(difficulty): measures["exact_match"] for difficulty, measures in by_difficulty.items()}
                lines.setdefault(title, {})[record["num_steps"]] = found
    if not lines:
        return None
    figure, axes = panels(len(lines), 4, size=(2.9, 2.5), margin=(1.2, 0.4))
    from matplotlib import colormaps

    # From light to dark, for depths that grow.
    colours = colormaps["viridis_r"](np.linspace(0.15, 0.95, len(depths)))
    for axis, (title, by_depth) in zip(axes, lines.items(), strict=True):
        for (depth, found), colour in zip(by_depth.items(), colours, strict=False):
            label = "accuracy" if depth is None else f"r = {depth}"
            axis.plot(list(found), list(found.values()), "o-", color=colour, label=label, markersize=3)
        axis.set(xlabel="difficulty", xticks=sorted(next(iter(by_depth.values()))))
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    _accuracy_axis(axes)
    for axis in axes[::4]:
        axis.set_ylabel("exact match")
    _legend(figure)
    return figure
