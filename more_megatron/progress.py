"""Progress bars on standard error."""

import sys

from tqdm import tqdm


def progress_bar(total: int | None, unit: str, name: str, show: bool) -> tqdm:
    """Return a bar that is redrawn rarely where nobody watches.

    A total of None is one that is not known; bytes, unit B, are scaled.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=name, mininterval=interval, disable=not show)
