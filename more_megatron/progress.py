"""Progress bars on standard error."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int | None, unit: str, name: str, show: bool) -> tqdm:
    """Return a bar that is redrawn rarely where nobody watches.

    Args:
        total: What is to be done; None if that is not known.
        unit: In which unit; bytes are scaled.
        name: What is being done.
        show: Whether to draw it.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=name, mininterval=interval, disable=not show)
