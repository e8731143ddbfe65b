"""Progress on standard error: bytes of text, tokens, MB/s."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A progress bar over the bytes of the inputs.

    Args:
        total: Bytes to read; None if compressed inputs make it unknown.
        show: Whether to draw the bar.
    """

    def __init__(self, total: int | None, show: bool = True) -> None:
        self._tokens = 0
        self._bar: Any = None
        if show:
            from tqdm import tqdm

            pause = 0.2 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokens 0", mininterval=pause)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def add(self, size: int, tokens: int) -> None:
        """Count a block of some bytes and tokens."""
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_description_str(f"tokens {self._tokens / 1e6:.2f}M", refresh=False)
            self._bar.update(size)

    def close(self) -> None:
        """Draw the bar for the last time."""
        if self._bar is not None:
            self._bar.close()
