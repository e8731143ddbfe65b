"""The report of a comparison: one content, as JSON, as Markdown, and as one HTML file that needs no other."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from more_megatron import __version__
from more_megatron.data.indexed import read_manifest
from more_megatron.errors import MoREError
from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.experiment import Flags, command_line
from more_megatron.evaluation.comparison.figures import draw_all
from more_megatron.evaluation.comparison.measures import (
    ArmResult,
    RunResult,
    collect,
    difference,
    results_by_arm,
    task_names,
)
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.evaluation.comparison.timing import Timing, read_timings
from more_megatron.platform.packages import has_package
from more_megatron.unfinished import unfinished_file

__all__ = ["check_packages", "write_report"]

_MATCHED = {
    "flops": "training FLOPs a token at the mean depth",
    "parameters": "parameters",
    "both": "training FLOPs a token at the mean depth, and parameters where widths allow",
    "flags": "nothing but the flags",
}
_PACKAGES = ("megatron-core", "torch", "numpy")


def check_packages() -> None:
    """Refuse to begin what could not be reported.

    Raises:
        MoREError: If a package is missing.
    """
    if missing := [name for name in ("matplotlib", "jinja2", "scipy") if not has_package(name)]:
        raise MoREError(
            f"a report needs {' and '.join(missing)}: pip install {' '.join(missing)}, or the extra `report`"
        )


def write_report(plan: Plan, folder: Path) -> list[RunResult]:
    """Write report.json, report.md and report.html, and return the runs that did not finish.

    Args:
        plan: The plan.
        folder: Folder of the comparison.
    """
    import jinja2

    runs = collect(plan, folder)
    content = _content(plan, runs, folder)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("more_megatron.evaluation.comparison"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {"number": _number, "spread": _spread}
    for name in ("report.md", "report.html"):
        with unfinished_file(folder / name) as unfinished:
            unfinished.write_text(templates.get_template(f"{name}.j2").render(content))
    for point in content["points"]:
        del point["figures"]
    with unfinished_file(folder / "report.json") as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=1))
    return [run for run in runs if run.state != "finished"]


def _content(plan: Plan, runs: list[RunResult], folder: Path) -> dict[str, Any]:
    """Return all that a report says."""
    experiment, timings = plan.experiment, read_timings(folder / "timings.json")
    results = results_by_arm(plan, runs)
    points = []
    for number, flags in enumerate(plan.points):
        arms = [result for result in results if result.arm.point == number]
        timed = [timing for timing in timings if timing.point == number]
        points.append(_point(experiment, flags, arms, timed))
    return {
        "title": experiment["title"],
        "date": datetime.date.today().isoformat(),
        "matched": _MATCHED[experiment["match"]],
        "match": experiment["match"],
        "seeds": experiment["seeds"],
        "depths": experiment["depths"],
        "points": points,
        "health_figures": health.FIGURES,
        "unfinished": [run for run in map(dataclasses.asdict, runs) if run["state"] != "finished"],
        "runs": [{name: value for name, value in vars(run).items() if name != "health"} for run in runs],
        "absent": list(_absent(runs, timings)),
        "versions": {"more-megatron": __version__, "Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {_processor()}",
        "experiment": experiment,
    }


def _point(
    experiment: dict[str, Any], flags: Flags, arms: Sequence[ArmResult], timings: Sequence[Timing]
) -> dict[str, Any]:
    baseline = next((arm for arm in arms if arm.arm.name == experiment["baseline"]), arms[0])
    by_arm = {timing.arm: dataclasses.asdict(timing) for timing in timings}
    return {
        "flags": " ".join(command_line(flags)),
        "baseline": baseline.arm.name,
        "arms": [_arm(arm, baseline) | {"timing": by_arm.get(arm.arm.name)} for arm in arms],
        "depths": sorted({depth for arm in arms for depth in arm.depths}),
        "answers": _answer_names(arms),
        "tasks": {
            task: sorted({each for arm in arms for each in arm.by_difficulty(task)}) for task in task_names(arms)
        },
        "figures": list(draw_all(arms, timings, _MATCHED[experiment["match"]])),
    }


def _arm(result: ArmResult, baseline: ArmResult) -> dict[str, Any]:
    arm, loss = result.arm, result.loss
    against = None if result is baseline else difference(result, baseline)
    ratio = _bytes_a_token(arm.flags)
    depths = sorted({depth for run in result.finished for depth in run.answers})
    return {
        "name": arm.name,
        "system": arm.flags.get("more-variant"),
        "parameters": arm.parameters,
        "active_parameters": arm.active_parameters,
        "flops_per_token": arm.flops,
        "ratios": arm.ratios,
        "tokens": arm.tokens,
        "total_flops": arm.flops * arm.tokens,
        "refusal": arm.refusal,
        "loss": loss and dataclasses.asdict(loss),
        "perplexity": loss and math.exp(loss.mean),
        "byte_perplexity": loss and ratio and math.exp(loss.mean / ratio),
        "difference": against and dataclasses.asdict(against) | {"is_carried": against.is_carried},
        "loss_at": {depth: dataclasses.asdict(each) for depth in result.depths if (each := result.loss_at(depth))},
        "answers_at": {
            name: {depth: dataclasses.asdict(each) for depth in depths if (each := result.answers_at(depth, name))}
            for name in _answer_names([result])
        },
        "usual_depth": result.usual_depth,
        "by_difficulty": {
            task: {difficulty: dataclasses.asdict(each) for difficulty, each in result.by_difficulty(task).items()}
            for task in task_names([result])
        },
        "seeds": {run.seed: run.loss if run.state == "finished" else run.state for run in result.runs},
        "health": health.summary(result),
        "command": " ".join(command_line(arm.flags)),
    }


def _answer_names(arms: Sequence[ArmResult]) -> list[str]:
    return sorted({name for arm in arms for run in arm.finished for at in run.answers.values() for name in at})


def _bytes_a_token(flags: Flags) -> float | None:
    """Return the bytes of text a token of the dataset; None for several datasets, or one without a manifest."""
    manifest = read_manifest(flags["data-path"]) if isinstance(flags.get("data-path"), str) else None
    return manifest["text_bytes"] / manifest["tokens"] if manifest and manifest.get("text_bytes") else None


def _absent(runs: Sequence[RunResult], timings: Sequence[Timing]) -> list[str]:
    """Return why sections are missing, one line each."""
    lines = []
    if not timings:
        lines.append("Speed and memory: the arms were not timed; --time does that.")
    if not any(run.health for run in runs):
        lines.append("Health: no run has written a health.jsonl (--health-interval).")
    if not any(run.by_difficulty for run in runs):
        lines.append("Accuracy by difficulty: no run was asked problems when it had ended; --tasks does that.")
    if not any(run.answers for run in runs):
        lines.append("Accuracy: no run was trained on problems with answers (--tasks, or --loss-on-answers).")
    return lines


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return a number as a table has it, a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value / scale:,.{digits}f}"


def _spread(value: dict[str, Any] | None, digits: int = 3) -> str:
    """Return mean and standard deviation as a table has them."""
    if value is None:
        return "-"
    if math.isnan(value["mean"]):
        return "not finite"
    mean = f"{value['mean']:.{digits}f}"
    return mean if math.isnan(value["deviation"]) else f"{mean} ± {value['deviation']:.{digits}f}"


def _finite(value: Any) -> Any:
    """Return the value without numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
