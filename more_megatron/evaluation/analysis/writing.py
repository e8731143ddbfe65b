"""What every analysis leaves: its figures as JSON, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from more_megatron.unfinished import write_whole

__all__ = ["write_analysis"]


def write_analysis(
    name: str, report: dict[str, Any], draw: Callable[[dict[str, Any], Path], list[Path]], folder: Path
) -> str:
    """Write a report as `NAME.json`, draw it into the folder, and return a line that says where everything is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    return f"written: {', '.join(map(str, (folder / f'{name}.json', *draw(report, folder))))}"
