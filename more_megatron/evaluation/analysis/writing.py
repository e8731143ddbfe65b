"""What every analysis leaves: its figures as JSON, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from more_megatron.unfinished import unfinished_file

__all__ = ["write_analysis"]


def write_analysis(
    name: str, report: dict[str, Any], draw: Callable[[dict[str, Any], Path], list[Path]], folder: Path
) -> str:
    """Write a report as `NAME.json`, draw it, and return a line that says where everything is.

    Args:
        name: What the analysis is called.
        report: All figures.
        draw: Draws a report into a folder and returns the files.
        folder: Where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished_file(folder / f"{name}.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    return f"written: {', '.join(map(str, (folder / f'{name}.json', *draw(report, folder))))}"
