"""A mean number of recurrence steps that changes as training goes on."""

from __future__ import annotations

from bisect import bisect_right

from more_megatron.errors import MoREError

__all__ = ["Curriculum"]

_FLAG = "--recurrence-curriculum"


class Curriculum:
    """Maps the training step to the mean number of recurrence steps.

    Args:
        text: Comma-separated `iteration:steps`, for example `0:1,10000:2,20000:4`. Iterations ascend from 0.

    Raises:
        MoREError: If the text is not of that form.
    """

    def __init__(self, text: str) -> None:
        entries = [self._entry(part) for part in text.split(",")]
        self._starts = [start for start, _ in entries]
        self._steps = [steps for _, steps in entries]
        if self._starts[0] != 0:
            raise MoREError(f"{_FLAG} {text} must say what holds at iteration 0: let it begin with 0:STEPS")
        if any(later <= earlier for earlier, later in zip(self._starts, self._starts[1:], strict=False)):
            raise MoREError(f"{_FLAG} {text} is out of order: sort its iterations, each once")

    def steps_at(self, step: int) -> int:
        """Return the mean number of recurrence steps after `step` training steps."""
        return self._steps[bisect_right(self._starts, step) - 1]

    @property
    def means(self) -> list[int]:
        """The mean numbers of recurrence steps, in order."""
        return list(self._steps)

    @property
    def last(self) -> int:
        """The mean number of recurrence steps in the end."""
        return self._steps[-1]

    @staticmethod
    def _entry(part: str) -> tuple[int, int]:
        start, separator, steps = part.strip().partition(":")
        if not (separator and start.isdecimal() and steps.isdecimal() and int(steps) > 0):
            raise MoREError(f"{_FLAG} has the entry {part!r}: write ITERATION:STEPS, as in 0:1,10000:4")
        return int(start), int(steps)
