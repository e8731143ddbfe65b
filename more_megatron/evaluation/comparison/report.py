"""The report of a comparison: one content, as JSON, as Markdown, and as one HTML file that needs no other."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from more_megatron import __version__
from more_megatron.data.indexed import read_manifest
from more_megatron.errors import MoREError
from more_megatron.evaluation.command_lines import Flags, as_typed
from more_megatron.evaluation.comparison import health
from more_megatron.evaluation.comparison.experiment import MATCHES
from more_megatron.evaluation.comparison.figures import draw_all
from more_megatron.evaluation.comparison.measures import ArmResult, RunResult, Spread, collect, difference
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.platform.packages import has_package
from more_megatron.unfinished import write_whole

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
    """Write report.json, report.md and report.html into the folder, and return the runs that did not finish."""
    import jinja2

    content = _content(plan, folder)
    texts = {}
    for kind in ("md", "html"):
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("more_megatron.evaluation.comparison"),
            autoescape=kind == "html",
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        templates.filters |= {"at": "r = {}".format, "number": _number, "spread": _spread, "spreads": _spreads}
        texts[f"report.{kind}"] = templates.get_template("report.j2").render(content, kind=kind)
    for point in content["points"]:
        del point["figures"]
    texts["report.json"] = json.dumps(_plain(content), indent=1)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return content["unfinished"]


def _content(plan: Plan, folder: Path) -> dict[str, Any]:
    experiment, results, times = plan.experiment, collect(plan, folder), folder / "timings.json"
    runs = [run for arm in results for run in arm.runs]
    timings = json.loads(times.read_text()) if times.exists() else []
    points = []
    for number, flags in enumerate(plan.points):
        arms = [result for result in results if result.arm.point == number]
        timed = {timing["arm"]: timing for timing in timings if timing["point"] == number}
        points.append(_point(experiment, flags, arms, timed))
    return {
        "title": experiment["title"],
        "date": datetime.date.today().isoformat(),
        "matched": MATCHES[experiment["match"]],
        "match": experiment["match"],
        "seeds": experiment["seeds"],
        "depths": experiment["depths"],
        "points": points,
        "health_figures": health.FIGURES,
        "unfinished": [run for run in runs if run.state != "finished"],
        "runs": [{name: value for name, value in vars(run).items() if name != "health"} for run in runs],
        "versions": {"more-megatron": __version__, "Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {_processor()}",
        "experiment": experiment,
    }


def _point(
    experiment: dict[str, Any], flags: Flags, arms: Sequence[ArmResult], timings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    baseline = next((arm for arm in arms if arm.arm.name == experiment["baseline"]), arms[0])
    tasks = sorted({task for arm in arms for task in arm.by_difficulty})
    return {
        "flags": as_typed({name: "null" if value is None else value for name, value in flags.items()}),
        "baseline": baseline.arm.name,
        "arms": [_arm(arm, baseline) | {"timing": timings.get(arm.arm.name)} for arm in arms],
        "depths": sorted({depth for arm in arms for depth in arm.loss_at}),
        "answers": sorted({name for arm in arms for name in arm.answers}),
        "tasks": {task: sorted({each for arm in arms for each in arm.by_difficulty.get(task, {})}) for task in tasks},
        "figures": draw_all(arms, MATCHES[experiment["match"]]),
    }


def _arm(result: ArmResult, baseline: ArmResult) -> dict[str, Any]:
    arm, loss = result.arm, result.loss
    ratio = _bytes_a_token(arm.flags)
    return {
        **{name: value for name, value in vars(arm).items() if name not in ("flags", "flops")},
        "system": arm.flags.get("more-variant"),
        "flops_per_token": arm.flops,
        "total_flops": arm.flops * arm.tokens,
        "loss": loss,
        "perplexity": loss and math.exp(loss.mean),
        "byte_perplexity": loss and ratio and math.exp(loss.mean / ratio),
        "difference": None if result is baseline else difference(result, baseline),
        "loss_at": result.loss_at,
        "answers_at": result.answers,
        "usual_depth": result.usual_depth,
        "by_difficulty": result.by_difficulty,
        "seeds": {run.seed: run.loss if run.state == "finished" else run.state for run in result.runs},
        "health": health.summary(result),
        "command": as_typed(arm.flags),
    }


def _bytes_a_token(flags: Flags) -> float | None:
    """Return the bytes of text a token of the dataset; None for several datasets, or one without a manifest."""
    manifest = read_manifest(flags["data-path"]) if isinstance(flags.get("data-path"), str) else None
    return manifest["text_bytes"] / manifest["tokens"] if manifest and manifest.get("text_bytes") else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return a number as a table has it, a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value / scale:,.{digits}f}"


def _spread(value: Spread | None, digits: int = 3) -> str:
    """Return mean and standard deviation as a table has them."""
    if value is None:
        return "-"
    if math.isnan(value.mean):
        return "not finite"
    mean = f"{value.mean:.{digits}f}"
    return mean if math.isnan(value.deviation) else f"{mean} ± {value.deviation:.{digits}f}"


def _spreads(values: Mapping[int, Spread], keys: Sequence[int]) -> list[str]:
    return [_spread(values.get(key)) for key in keys]


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: data classes as tables, and null for numbers that are not finite."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
