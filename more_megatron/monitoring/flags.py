"""Flags of what is watched while training: each field is a flag, its docstring the help."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["HEALTH_FILE", "HealthFlags"]

# In the `--save` folder: a line of JSON for each step that was watched.
HEALTH_FILE = "health.jsonl"


@dataclass
class HealthFlags:
    """How the health of a run is watched."""

    health_interval: int = 100
    """Watch recurrence, routing, gradients and loss in every N-th step, and warn of what is not healthy. 0: never."""

    health_stop: Literal["none", "non-finite", "collapse", "any"] = "non-finite"
    """What ends a run: nothing; numbers that are not finite, of which nothing is saved; a collapse as well, or any
    warning, after a checkpoint was saved."""

    health_ranges: str | None = None
    """YAML file with ranges that replace those of docs/health.md: `routing/load cv: [0, 0.5]`, null for an open end."""
