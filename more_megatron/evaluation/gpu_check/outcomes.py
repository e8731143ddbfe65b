"""What a case of the check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Finding", "Outcome", "Status"]


class Status(StrEnum):
    """How a case ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass
class Finding:
    """What a case measured.

    Attributes:
        figures: Numbers and words by name.
        faults: What is not as it must be, a line each.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def require(self, holds: bool, fault: str) -> None:
        """Note a fault unless a condition holds."""
        if not holds:
            self.faults.append(fault)


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        stage: Letter of the stage.
        case: Name of the case within its stage.
        status: Whether it passed.
        seconds: Time it took.
        figures: What it measured.
        reason: Why it failed or was skipped, in one line.
        details: Traceback and output of a case that raised.
    """

    stage: str
    case: str
    status: Status
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    details: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what goes into the JSON report."""
        fields = asdict(self)
        del fields["details"]
        return fields
