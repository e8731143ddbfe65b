"""What cases of the check found, and the report: in lines as it comes, in JSON for programs, in Markdown for people."""

import datetime
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


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

    # What the runner adds: which case it was, and how it went
    stage: str = ""  # letter of the stage
    case: str = ""
    seconds: float = 0.0  # time it took
    details: str = ""  # traceback and output of a case that raised

    @property
    def status(self) -> Status:
        """How the case ended."""
        if self.faults:
            return Status.FAILED
        return Status.SKIPPED if self.skipped else Status.PASSED

    @property
    def reason(self) -> str:
        """Why it failed or was skipped, in one line."""
        return "; ".join(self.faults) or self.skipped

    def require(self, holds: bool, fault: str) -> None:
        """Note a fault unless a condition holds."""
        if not holds:
            self.faults.append(fault)


class Report:
    """Prints outcomes and keeps `report.json`, `report.md` and `failures.log` in a folder up to date."""

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.log").unlink(missing_ok=True)
        self._folder, self._command = folder, command
        self._date = datetime.date.today().isoformat()
        self._stages: dict[str, str] = {}
        self._found: list[Finding] = []

    def begin(self, letter: str, title: str) -> None:
        """Say that a stage begins."""
        self._stages[letter] = title
        print(f"\n{letter}  {title}", flush=True)

    def add(self, finding: Finding) -> None:
        """Print what a case found and write the files anew."""
        self._found.append(finding)
        print(_line(finding), flush=True)
        if finding.details:
            with open(self._folder / "failures.log", "a") as log:
                log.write(f"=== {finding.stage} {finding.case}: {finding.reason}\n{finding.details}\n\n")
        names = ("stage", "case", "status", "seconds", "figures", "reason")
        outcomes = [{name: getattr(one, name) for name in names} for one in self._found]
        content = {"command": self._command, "date": self._date, "outcomes": outcomes}
        (self._folder / "report.json").write_text(json.dumps(content, indent=1))
        (self._folder / "report.md").write_text(self._markdown())

    def summary(self) -> str:
        """Return how many cases ended how."""
        counts = {status: sum(one.status is status for one in self._found) for status in Status}
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)

    @property
    def failed(self) -> bool:
        """Whether a case failed."""
        return any(one.status is Status.FAILED for one in self._found)

    def _markdown(self) -> str:
        parts = [f"# Check of {self._date}\n\n    {self._command}\n\n{self.summary()}.\n"]
        for letter, title in self._stages.items():
            parts.append(f"## {letter}: {title}\n\n{_table([one for one in self._found if one.stage == letter])}")
        return "\n".join(parts)


def _line(found: Finding) -> str:
    figures = ", ".join(f"{name} {_value(value)}" for name, value in found.figures.items())
    words = figures if found.status is Status.PASSED else found.reason
    if found.status is Status.FAILED and figures:
        words += f" ({figures})"
    return f"  {found.status:8}{found.seconds:6.1f} s  {found.case}: {words}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "; ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _table(findings: list[Finding]) -> str:
    """Return a table with a column for each figure that any of the cases has."""
    names = list(dict.fromkeys(name for one in findings for name in one.figures))
    heads = ["case", "", "s", *names, "remark"]
    rows = [heads, ["---"] * len(heads)]
    for one in findings:
        values = [_value(one.figures[name]) if name in one.figures else "" for name in names]
        rows.append([one.case, str(one.status), f"{one.seconds:.1f}", *values, one.reason.replace("|", "/")])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
