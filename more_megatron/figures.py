"""What figures have in common, those of a run that trains and those of evaluation, and how they are written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from more_megatron.errors import MoREError
from more_megatron.unfinished import unfinished_file, write_whole

_MOST_NUMBERS = 200
_MOST_TICKS = 16


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches, which needs no screen.

    Raises:
        MoREError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MoREError("figures need matplotlib: pip install matplotlib, or the extra `plots`") from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))


def panels(
    count: int, most: int, size: tuple[float, float], margin: tuple[float, float] = (0.0, 0.0)
) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, at most so many in a row, given the size of one and what is left beside all."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = new_figure(margin[0] + columns * size[0], margin[1] + rows * size[1])
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def spread[T](values: Sequence[T], most: int) -> list[T]:
    """Return at most so many of some values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, most)]


def heat_map(
    axis: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[Any] | None = None,
    highest: float | None = None,
    colours: str = "Blues",
) -> Any:
    """Draw a table as colours, with its numbers where there is room, and return the image.

    Args:
        axis: Axes of matplotlib.
        values: [rows, columns]; NaN is left blank.
        rows: Names of the rows; empty for none.
        columns: Names of the columns. Default: their numbers.
        highest: Value of the darkest colour. Default: the greatest of the values.
        colours: Name of a sequential colour map.
    """
    top = highest if highest is not None else max(float(np.nanmax(values)), 1e-9)
    image = axis.imshow(values, cmap=colours, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
    names = range(values.shape[1]) if columns is None else columns
    shown = spread(range(values.shape[1]), _MOST_TICKS)
    axis.set_xticks(shown, [str(names[column]) for column in shown], fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    if not rows:
        axis.tick_params(left=False)
    if values.size <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.6 * top else "#222222"
                axis.text(column, row, _number(value), ha="center", va="center", fontsize=7, color=colour)
    return image


def draw_loads(axis: Any, loads: Mapping[str, np.ndarray], columns: Sequence[Any] | None = None) -> None:
    """Draw the loads of experts as colours, a row for each router.

    Args:
        axis: Axes of matplotlib.
        loads: The share of all choices that fell on each expert, [experts], by name of the router.
        columns: Names of the experts. Default: their numbers.
    """
    values = np.full((len(loads), max(map(len, loads.values()))), np.nan)
    for row, load in enumerate(loads.values()):
        values[row, : len(load)] = np.asarray(load) * len(load)
    image = heat_map(axis, values, list(loads), columns, max(2.0, float(np.nanmax(values))), colours="Purples")
    axis.set_xlabel("expert")
    axis.figure.colorbar(image, ax=axis, label="tokens, in parts of the mean", shrink=0.8)


def _number(value: float) -> str:
    """Return two digits behind the point, without the zero in front of it."""
    text = f"{value:.2f}"
    return text.removeprefix("0") if value < 1.0 and text != "1.00" else text


def name_axes(axis: Any, title: str, x: str = "", y: str = "") -> None:
    """Give one of many small panels a title, and names of what stands below and at the side."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)


def depth_axis(axis: Any, steps: Sequence[int], **ticks: Any) -> None:
    """Let the axis below be that of recurrence steps, each about twice the one before."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps], **ticks)
    axis.minorticks_off()


def write_results(folder: Path, texts: Mapping[str, str], figures: Mapping[str, Any]) -> str:
    """Write texts, and figures that are not None, into a folder, and return a line that says where everything is.

    Each file gets its name when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        with unfinished_file(folder / name) as unfinished:
            figure.savefig(unfinished, dpi=130, format="png")
    return f"written: {', '.join(str(folder / name) for name in (*texts, *drawn))}"
