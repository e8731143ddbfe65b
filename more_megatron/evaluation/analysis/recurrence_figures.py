"""The movement of states, in pictures."""

from typing import Any

import numpy as np

from more_megatron.evaluation.analysis.trajectories import KINDS
from more_megatron.figures import depth_axis, name_axes, panels, spread

_MOST_RECURRENCES, _MOST_TOKENS = 4, 40
_COLOURS = dict(zip(KINDS, ("#2166ac", "#b2182b", "#1b7837"), strict=True))


def draw_recurrence(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a report, as in `recurrence.json`, by their files."""
    draw = {"trajectories": _plane, "distance": _distances, "depth": _depth}
    return {f"recurrence_{name}.png": figure(report) for name, figure in draw.items()}


def _token(text: str) -> str:
    """Return a token as it can be read in a picture."""
    shown = text.replace("\n", "\\n").replace("$", r"\$")
    return shown if shown.strip() else f"'{shown}'"


def _plane(report: dict[str, Any]) -> Any:
    """Draw the ways of some tokens' states in the plane of the principal components, a panel for each recurrence."""
    shown = spread(report["recurrences"], _MOST_RECURRENCES)
    figure, axes = panels(len(shown), _MOST_RECURRENCES, size=(4.6, 4.9), margin=(0.4, 0.0))
    for axis, found in zip(axes, shown, strict=True):
        for token, way in found["plane"].items():
            points = np.array(way)
            kind = found["kinds"][int(token)] if found["kinds"] else ""
            colour = _COLOURS.get(kind, "#555555")
            axis.plot(*points.T, "-", color=colour, linewidth=0.9, alpha=0.8)
            axis.scatter(*points.T, s=np.linspace(3, 12, len(points)), color=colour, linewidths=0)
            axis.scatter(*points[:1].T, s=22, facecolors="white", edgecolors=colour, zorder=3)
            beside = {"xytext": (4, 2), "textcoords": "offset points"}
            axis.annotate(_token(report["tokens"][int(token)]), points[-1], fontsize=7, color=colour, **beside)
        counts = found["counts"] or {}
        words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        first, second = (f"{share:.0%}" for share in found["explained_variance"])
        title = f"recurrence {found['recurrence']}\n{words}"
        name_axes(axis, title, f"component 1 ({first} of the variance)", f"component 2 ({second})")
        axis.margins(0.12)
    handles = [axes[0].plot([], [], "o-", color=_COLOURS[kind], label=kind)[0] for kind in KINDS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS), fontsize=8, frameon=False)
    figure.suptitle(f"States of some tokens over {report['num_steps']} steps, from the open circle on", fontsize=10)
    return figure


def _distances(report: dict[str, Any]) -> Any:
    """Draw the distance of each token's state to its last one, on a logarithmic scale of colours."""
    shown = spread(report["recurrences"], _MOST_RECURRENCES)
    tokens = report["tokens"][:_MOST_TOKENS]
    figure, axes = panels(len(shown), _MOST_RECURRENCES, size=(3.6, 0.17 * len(tokens)), margin=(1.6, 1.4))
    for number, (axis, found) in enumerate(zip(axes, shown, strict=True)):
        values = np.array(found["distance_to_last"])[: len(tokens), :-1]
        logs = np.log10(np.maximum(values, 1e-4))
        image = axis.imshow(logs, cmap="magma_r", vmin=-4, vmax=0.3, aspect="auto", interpolation="nearest")
        ticks = spread(range(values.shape[1]), 8)
        axis.set_xticks(ticks, [str(tick + 1) for tick in ticks], fontsize=7)
        axis.set_yticks(range(len(tokens)), [_token(token) for token in tokens] if number == 0 else [], fontsize=6)
        axis.set_title(f"recurrence {found['recurrence']}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axes[0].set_ylabel("token", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("distance to the last state / its length", fontsize=8)
    bar.set_ticks([-4, -3, -2, -1, 0], labels=["≤0.0001", "0.001", "0.01", "0.1", "1"], fontsize=7)
    figure.suptitle("How soon each token's state is where it ends", fontsize=10)
    return figure


def _depth(report: dict[str, Any]) -> Any:
    """Draw loss and predictions against the depth, and how far apart several starts end up."""
    depths, independence = report["depths"], report["path_independence"]
    steps = [depth["num_steps"] for depth in depths]
    figure, axes = panels(3 if independence else 2, 3, size=(4.0, 3.4))
    axes[0].plot(steps, [depth["loss"] for depth in depths], "o-", color="#2166ac", markersize=3)
    axes[0].set(title="Loss", ylabel="nats a token")
    axes[1].plot(steps, [depth["same_prediction_as_last"] for depth in depths], "o-", color="#1b7837", markersize=3)
    axes[1].set(title="Predictions", ylabel="share that is the same as at the last r", ylim=(0, 1.03))
    for axis in axes[:2]:
        axis.axvline(report["trained_steps"], color="#888888", linestyle=":", linewidth=1)
        depth_axis(axis, steps, fontsize=7)
        axis.set_xlabel("recurrence steps r (dotted: in training)", fontsize=8)
    if independence:
        for number, distances in enumerate(independence["distance"], start=1):
            axes[2].semilogy(range(1, len(distances) + 1), np.maximum(distances, 1e-7), label=f"recurrence {number}")
        axes[2].set_title(f"{independence['initial_states']} initial states")
        axes[2].set_xlabel("step", fontsize=8)
        axes[2].set_ylabel("distance of two runs / length of a state", fontsize=8)
        if len(independence["distance"]) <= 8:
            axes[2].legend(fontsize=7)
    return figure
