"""A number that changes as training goes on."""

from bisect import bisect_right
from itertools import pairwise

from more_megatron.errors import MoREError


class Curriculum:
    """Maps the training step to a number, the mean of recurrence steps or another; `values` are the numbers, in order.

    Args:
        text: Comma-separated `iteration:number`, for example `0:1,10000:2,20000:4`. Iterations ascend from 0.
        flag: The flag that it comes from.

    Raises:
        MoREError: If the text is not of that form.
    """

    def __init__(self, text: str, flag: str = "--recurrence-curriculum") -> None:
        entries = [_entry(part, flag) for part in text.split(",")]
        self._starts = [start for start, _ in entries]
        self.values = [value for _, value in entries]
        if self._starts[0] != 0:
            raise MoREError(f"{flag} {text} must say what holds at iteration 0: let it begin with 0:NUMBER")
        if any(later <= earlier for earlier, later in pairwise(self._starts)):
            raise MoREError(f"{flag} {text} is out of order: sort its iterations, each once")

    def at(self, step: int) -> int:
        """Return the number after `step` training steps."""
        return self.values[bisect_right(self._starts, step) - 1]


def _entry(part: str, flag: str) -> tuple[int, int]:
    start, separator, value = part.strip().partition(":")
    if not (separator and start.isdecimal() and value.isdecimal() and int(value) > 0):
        raise MoREError(f"{flag} has the entry {part!r}: write ITERATION:NUMBER, as in 0:1,10000:4")
    return int(start), int(value)
