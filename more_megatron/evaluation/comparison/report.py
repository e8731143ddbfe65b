"""The report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from more_megatron.evaluation.comparison.measures import RunResult, collect
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.unfinished import unfinished_file

__all__ = ["write_report"]


def write_report(plan: Plan, folder: Path) -> list[RunResult]:
    """Write report.json; return runs that failed."""
    runs = collect(plan, folder)
    with unfinished_file(folder / "report.json") as unfinished:
        unfinished.write_text(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
    return [run for run in runs if run.state != "finished"]
