"""What cases of the check found, and the report: in lines as it comes, in JSON for programs, in Markdown for people."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["Finding", "Outcome", "Report", "Status"]


class Status(StrEnum):
    """How a case ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass
class Finding:
    """What a case measured, numbers and words by name, and what is not as it must be, a line each."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skipped: str = ""  # why nothing was done, where this device cannot

    def require(self, holds: bool, fault: str) -> None:
        """Note a fault unless a condition holds."""
        if not holds:
            self.faults.append(fault)


@dataclass(frozen=True)
class Outcome:
    """How one case ended."""

    stage: str  # letter of the stage
    case: str
    status: Status
    seconds: float = 0.0  # time it took
    figures: dict[str, Any] = field(default_factory=dict)  # what it measured
    reason: str = ""  # why it failed or was skipped, in one line
    details: str = ""  # traceback and output of a case that raised


class Report:
    """Prints outcomes and keeps `report.json`, `report.md` and `failures.log` in a folder up to date."""

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.log").unlink(missing_ok=True)
        self._folder, self._command = folder, command
        self._date = datetime.date.today().isoformat()
        self._stages: dict[str, str] = {}
        self._outcomes: list[Outcome] = []

    def begin(self, letter: str, title: str) -> None:
        """Say that a stage begins."""
        self._stages[letter] = title
        print(f"\n{letter}  {title}", flush=True)

    def add(self, outcome: Outcome) -> None:
        """Print an outcome and write the files anew."""
        self._outcomes.append(outcome)
        print(_line(outcome), flush=True)
        if outcome.details:
            with open(self._folder / "failures.log", "a") as log:
                log.write(f"=== {outcome.stage} {outcome.case}: {outcome.reason}\n{outcome.details}\n\n")
        outcomes = [{name: value for name, value in vars(one).items() if name != "details"} for one in self._outcomes]
        content = {"command": self._command, "date": self._date, "outcomes": outcomes}
        (self._folder / "report.json").write_text(json.dumps(content, indent=1))
        (self._folder / "report.md").write_text(self._markdown())

    def summary(self) -> str:
        """Return how many cases ended how."""
        counts = {status: sum(one.status is status for one in self._outcomes) for status in Status}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    @property
    def failed(self) -> bool:
        """Whether a case failed."""
        return any(one.status is Status.FAILED for one in self._outcomes)

    def _markdown(self) -> str:
        parts = [f"# Check of {self._date}\n\n    {self._command}\n\n{self.summary()}.\n"]
        for letter, title in self._stages.items():
            parts.append(f"## {letter}: {title}\n\n{_table([one for one in self._outcomes if one.stage == letter])}")
        return "\n".join(parts)


def _line(outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {_value(value)}" for name, value in outcome.figures.items())
    words = figures if outcome.status is Status.PASSED else outcome.reason
    if outcome.status is Status.FAILED and figures:
        words += f" ({figures})"
    return f"  {outcome.status:8}{outcome.seconds:6.1f} s  {outcome.case}: {words}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "; ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _table(outcomes: list[Outcome]) -> str:
    """Return a table with a column for each figure that any of the cases has."""
    names = list(dict.fromkeys(name for one in outcomes for name in one.figures))
    heads = ["case", "", "s", *names, "remark"]
    rows = [heads, ["---"] * len(heads)]
    for one in outcomes:
        values = [_value(one.figures[name]) if name in one.figures else "" for name in names]
        rows.append([one.case, str(one.status), f"{one.seconds:.1f}", *values, one.reason.replace("|", "/")])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
