"""Where figures go: a line of `health.jsonl`, TensorBoard, Weights & Biases."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from more_megatron.figures import draw_loads, new_figure
from more_megatron.monitoring.routing import Loads
from more_megatron.monitoring.watch import Key
from more_megatron.platform.packages import has_package


@dataclass(frozen=True)
class Report:
    """What is known of a training step that was watched."""

    iteration: int
    figures: Mapping[Key, float]  # values by figure
    loads: Loads  # load and mean probability of each expert, by place and step
    gradients: Mapping[str, np.ndarray]  # norm of each expert's gradient, by place
    warnings: list[str]  # what lies outside of its healthy range, one line each

    def append_to(self, path: Path) -> None:
        """Append one line of JSON to a file."""
        record = {
            "iteration": self.iteration,
            "figures": {key.tag: _number(value) for key, value in sorted(self.figures.items())},
            "experts": {
                key.tag: {"load": load.tolist(), "probability": probability.tolist()}
                for key, (load, probability) in sorted(self.loads.items())
            },
            "expert gradients": {place: list(map(_number, norms)) for place, norms in sorted(self.gradients.items())},
            "warnings": self.warnings,
        }
        with path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def write_to_tensorboard(self, writer: Any) -> None:
        """Write scalars, the load of experts as histograms, and as one figure where matplotlib is installed."""
        for key, value in self.figures.items():
            writer.add_scalar(f"health/{key.tag}", value, self.iteration)
        for key, (load, _) in self.loads.items():
            _add_histogram(writer, f"health/{key.tag}", load, self.iteration)
        if self.loads and has_package("matplotlib"):
            writer.add_figure("health/routing/load", load_figure(self.loads, self.iteration), self.iteration)

    def write_to_wandb(self, writer: Any) -> None:
        """Write scalars, a table with a row for each expert, and histograms of the loads."""
        import wandb

        content: dict[str, Any] = {f"health/{key.tag}": value for key, value in self.figures.items()}
        rows = []
        for key, (load, probability) in self.loads.items():
            edges = np.arange(len(load) + 1) - 0.5
            content[f"health/{key.tag}"] = wandb.Histogram(np_histogram=(load, edges))
            norms = self.gradients.get(key.place, np.full(len(load), np.nan))
            for expert, values in enumerate(zip(load, probability, norms, strict=True)):
                rows.append([key.place, key.step, expert, *map(float, values)])
        if rows:
            columns: list[Any] = ["layer", "step", "expert", "load", "probability", "gradient norm"]
            content["health/experts"] = wandb.Table(columns=columns, data=rows)
        writer.log(content, self.iteration)


def _number(value: float) -> float | None:
    """Return a number as JSON has it, which knows no others than finite ones."""
    return float(value) if math.isfinite(value) else None


def _add_histogram(writer: Any, tag: str, load: np.ndarray, iteration: int) -> None:
    """Write a histogram whose bars are the experts."""
    experts = np.arange(len(load))
    writer.add_histogram_raw(
        tag,
        min=-0.5,
        max=len(load) - 0.5,
        num=float(load.sum()),
        sum=float((load * experts).sum()),
        sum_squares=float((load * experts**2).sum()),
        bucket_limits=(experts + 0.5).tolist(),
        bucket_counts=load.tolist(),
        global_step=iteration,
    )


def load_figure(loads: Loads, iteration: int) -> Any:
    """Return a picture of the load of each expert, a row for each layer and step."""
    keys = sorted(loads, key=lambda key: (len(key.place), key.place, key.step))
    figure = new_figure(2.5 + 0.35 * min(max(len(load) for load, _ in loads.values()), 40), 1.6 + 0.22 * len(keys))
    axes = figure.subplots()
    names = [f"{key.place}, step {key.step}" if key.step else key.place for key in keys]
    draw_loads(axes, {name: loads[key][0] for name, key in zip(names, keys, strict=True)})
    axes.set_title(f"Load of experts, iteration {iteration}", fontsize=10)
    return figure
