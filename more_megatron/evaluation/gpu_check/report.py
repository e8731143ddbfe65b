"""What the check found, in lines as it comes, in JSON for programs and in Markdown for people."""

from __future__ import annotations

import datetime
import json
import threading
from pathlib import Path
from typing import Any

from more_megatron.evaluation.gpu_check.outcomes import Outcome, Status
from more_megatron.evaluation.gpu_check.stages import Stage

__all__ = ["Report"]

_WIDTH = 110


class Report:
    """Prints outcomes and keeps `report.json`, `report.md` and `failures.log` up to date.

    Args:
        folder: Where the files are.
        command: Command line of the check.
    """

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.log").unlink(missing_ok=True)
        self._folder, self._command = folder, command
        self._date = datetime.date.today().isoformat()
        self._stages: dict[str, str] = {}
        self._lock = threading.Lock()
        self.outcomes: list[Outcome] = []

    def begin(self, stage: Stage) -> None:
        """Say that a stage begins."""
        self._stages[stage.letter] = stage.title
        print(f"\n{stage.letter}  {stage.title}", flush=True)

    def add(self, outcome: Outcome) -> None:
        """Print an outcome and write the files anew."""
        with self._lock:
            self.outcomes.append(outcome)
            print(_line(outcome), flush=True)
            if outcome.details:
                with open(self._folder / "failures.log", "a") as log:
                    log.write(f"=== {outcome.stage} {outcome.case}: {outcome.reason}\n{outcome.details}\n\n")
            content = {
                "command": self._command,
                "date": self._date,
                "outcomes": [one.as_json() for one in self.outcomes],
            }
            (self._folder / "report.json").write_text(json.dumps(content, indent=1))
            (self._folder / "report.md").write_text(self._markdown())

    def summary(self) -> str:
        """Return how many cases ended how."""
        counts = {status: sum(one.status is status for one in self.outcomes) for status in Status}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    @property
    def failed(self) -> bool:
        """Whether a case failed."""
        return any(one.status is Status.FAILED for one in self.outcomes)

    def _markdown(self) -> str:
        parts = [f"# Check of {self._date}\n\n    {self._command}\n\n{self.summary()}.\n"]
        for letter, title in self._stages.items():
            outcomes = [one for one in self.outcomes if one.stage == letter]
            parts.append(f"## {letter}: {title}\n\n{_table(outcomes)}")
        return "\n".join(parts)


def _line(outcome: Outcome) -> str:
    words = outcome.reason if outcome.status is not Status.PASSED else _figures(outcome.figures)
    if outcome.status is Status.FAILED and outcome.figures:
        words += f" ({_figures(outcome.figures)})"
    return f"  {outcome.status:8}{outcome.seconds:6.1f} s  {outcome.case}: {words}"


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in figures.items())


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return "; ".join(_value(entry) for entry in value)
    return str(value)


def _table(outcomes: list[Outcome]) -> str:
    """Return a table with a column for each figure that any of the cases has."""
    names = list(dict.fromkeys(name for one in outcomes for name in one.figures))
    heads = ["case", "", "s", *names, "remark"]
    rows = [heads, ["---"] * len(heads)]
    for one in outcomes:
        values = [_value(one.figures[name]) if name in one.figures else "" for name in names]
        rows.append([one.case, str(one.status), f"{one.seconds:.1f}", *values, one.reason.replace("|", "/")])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
