"""Progress on standard error: bytes of input, tokens, MB/s."""

import sys
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A progress bar over the bytes of the inputs.

    Args:
        total: bytes to read; None if compressed inputs make it unknown.
        show: whether to draw the bar.
    """

    def __init__(self, total: int | None, show: bool = True) -> None:
        self.tokens = 0
        self.size = 0
        self._bar: Any = None
        if show:
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=total, unit="B", unit_scale=True, desc="tokens 0", mininterval=0.2 if terminal else 10.0
            )

    def add(self, size: int, tokens: int) -> None:
        """Count a block.

        Args:
            size: its bytes of input.
            tokens: its tokens.
        """
        self.tokens += tokens
        self.size += size
        if self._bar is not None:
            self._bar.set_description_str(f"tokens {self.tokens / 1e6:.2f}M", refresh=False)
            self._bar.update(size)

    def skip(self, size: int, tokens: int) -> None:
        """Count a part that an earlier run finished; it does not count for the speed."""
        if self._bar is not None:
            self._bar.initial += size
        self.add(size, tokens)

    def close(self) -> None:
        """Draw the bar for the last time."""
        if self._bar is not None:
            self._bar.close()
