"""Errors that a user can mend, and how a run ends on one: one line, no traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

__all__ = ["MoREError", "last_line", "one_line_errors"]

_PATIENCE_SECONDS = 10.0


class MoREError(ValueError):
    """A wrong flag, file, checkpoint or layout. The message says what, where and how to mend it."""


def last_line(error: BaseException) -> str:
    """Return the kind of an error and the last line of its text: those of checkpoints hold whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no further message'}"


def _message(error: BaseException) -> str:
    """Return the error's text in one line, or the failed assertion's source where it has none."""
    text = " ".join(str(error).split())
    if text:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {frame.line} ({os.path.basename(frame.filename)}:{frame.lineno})"


@contextlib.contextmanager
def one_line_errors(program: str, *expected: type[BaseException]) -> Iterator[None]:
    """End the process with one line on standard error when the block raises `MoREError` or an expected error.

    Every rank exits with code 1. An error that all ranks meet is reported once: the others wait a moment before they
    speak, and the launcher ends them as soon as rank 0 has. Set `MORE_TRACEBACK=1` to see where the error came from.

    Args:
        program: Name the line begins with.
        expected: Further errors that are the user's to mend in this block.
    """
    kinds: tuple[type[BaseException], ...] = (MoREError, *expected)
    try:
        yield
    except kinds as error:
        if os.environ.get("MORE_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE_SECONDS)
        print(f"{program}: error: {_message(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: pending collectives of the other ranks must not hold this one back.
        os._exit(1)
