"""What is seen of experts at first sight."""

from typing import Any

import numpy as np

from more_megatron.figures import heat_map, new_figure, spread

_MOST_LAYERS, _MOST_STEPS = 4, 4


def draw_experts(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a report, as in `experts.json`, by their files."""
    draw = {"kinds": _kinds, "overview": _overview, "load": _load, "tokens": _tokens}
    return {f"experts_{name}.png": figure(report) for name, figure in draw.items()}


def _kinds(report: dict[str, Any]) -> Any:
    """Draw the share of each kind of token that each expert takes; a panel for some layers and steps."""
    layers = spread(sorted({place["layer"] for place in report["places"]}), _MOST_LAYERS)
    steps = spread(sorted({place["step"] for place in report["places"]}), _MOST_STEPS)
    by_place = {(place["layer"], place["step"]): place for place in report["places"]}
    kinds = [(row, f"{name}\n{count:,}") for row, (name, count) in enumerate(report["kinds"].items()) if count > 0]
    width = 1.6 + len(steps) * max(2.6, 0.42 * report["num_experts"])
    figure = new_figure(width, 0.9 + len(layers) * (0.9 + 0.42 * len(kinds)))
    axes = figure.subplots(len(layers), len(steps), squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        place = by_place.get((layers[row], steps[column]))
        if place is None:
            axis.axis("off")
            continue
        shares = np.array(place["shares"])[[kind for kind, _ in kinds]]
        image = heat_map(axis, shares, [name for _, name in kinds] if column == 0 else [], highest=1.0)
        axis.set_title(f"layer {layers[row]}, step {steps[column]}   (NMI {place['specialisation']:.3f})", fontsize=9)
        if row == len(layers) - 1:
            axis.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="share of the kind's choices", shrink=0.8)
    figure.suptitle("Which expert takes which kind of token")
    return figure


def _overview(report: dict[str, Any]) -> Any:
    """Draw specialisation, entropies and change of all layers and steps."""
    places = report["places"]
    layers, steps = (sorted({place[name] for place in places}) for name in ("layer", "step"))
    panels = [
        ("specialisation", "Specialisation:\nNMI of kind and expert", "Blues", None),
        ("router_entropy", "Entropy of the router\n/ ln N", "Greens", 1.0),
        ("load_entropy", "Entropy of the load\n/ ln N", "Greens", 1.0),
    ]
    if len(steps) > 1:
        panels.append(("changed_since_step_before", "Share of tokens whose\nexperts changed", "Oranges", 1.0))
    width, height = max(3.0, 0.55 * len(steps) + 1.4), max(2.6, 0.36 * len(layers) + 1.4)
    figure = new_figure(len(panels) * width, height)
    for axis, (name, title, colours, highest) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        values = np.full((len(layers), len(steps)), np.nan)
        for place in places:
            values[layers.index(place["layer"]), steps.index(place["step"])] = place.get(name, np.nan)
        image = heat_map(axis, values, [str(layer) for layer in layers], steps, highest=highest, colours=colours)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="step", ylabel="layer")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def _load(report: dict[str, Any]) -> Any:
    """Draw the share of all choices that each expert has, in every layer and step."""
    places = report["places"]
    names = [f"layer {place['layer']}, step {place['step']}" for place in places]
    title = f"Load (1/N = {1 / report['num_experts']:.3f})"
    loads = [place["load"] for place in places]
    return _table(loads, names, title, "share of all choices", colours="Purples")


def _tokens(report: dict[str, Any]) -> Any:
    """Draw where the frequent tokens go, in the place that tells them apart best."""
    place = max(report["places"], key=lambda place: place["specialisation_by_token"])
    names = [f"{found['token']}  {found['count']:,}" for found in report["frequent_tokens"]]
    title = (
        f"The most frequent tokens in layer {place['layer']}, step {place['step']}"
        f"\n(NMI of token and expert {place['specialisation_by_token']:.3f})"
    )
    return _table(place["token_shares"], names, title, "share of the token's choices", highest=1.0)


def _table(rows: list[list[float]], names: list[str], title: str, label: str, **colours: Any) -> Any:
    """Draw a row for each name, [names, experts], and say what its numbers are."""
    figure = new_figure(max(4.5, 0.45 * len(rows[0]) + 2.2), 1.4 + 0.24 * len(names))
    axis = figure.subplots()
    image = heat_map(axis, np.array(rows), names, **colours)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("expert")
    figure.colorbar(image, ax=axis, label=label, shrink=0.8)
    return figure
