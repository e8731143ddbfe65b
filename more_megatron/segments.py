"""Variable-length sequences laid end to end, and the padded layout for kernels that want rectangles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

__all__ = ["Segments"]


@dataclass(frozen=True)
class Segments:
    """Where attention is confined: consecutive rows that belong together, in ascending position.

    Attributes:
        offsets: First row of each segment and the end of the last, int32 [segments + 1]. Segments may be empty.
        longest: Upper bound of the length of a segment.
    """

    offsets: torch.Tensor
    longest: int

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [rows, heads, d] as [segments that are not empty, heads, their longest, d], zeros behind the rows."""
        segments, length, places = self._places
        padded = rows.new_zeros(segments * length, *rows.shape[1:]).index_copy(0, places, rows)
        return padded.view(segments, length, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Undo `pad`."""
        places = self._places[2]
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, places)

    @functools.cached_property
    def without_empty(self) -> Segments:
        """The same segments but for those that are empty, which some kernels do not take."""
        return Segments(torch.unique_consecutive(self.offsets), self.longest)

    @functools.cached_property
    def _places(self) -> tuple[int, int, torch.Tensor]:
        """Number of segments that are not empty, length of the longest, and each row's place in the padded layout."""
        lengths = self.offsets.diff().long()
        lengths = lengths[lengths > 0]
        length = int(lengths.max()) if len(lengths) > 0 else 0
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        within = torch.arange(len(segment), device=lengths.device) - (lengths.cumsum(0) - lengths)[segment]
        return len(lengths), length, segment * length + within
