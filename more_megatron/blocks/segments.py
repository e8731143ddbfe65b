"""Variable-length sequences laid end to end, and the padded layout for kernels that want rectangles."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Segments"]

# Rectangles of each padded layout: with more of them there is less padding, and there are more calls.
_RECTANGLES = 4


@dataclass(frozen=True)
class Segments:
    """Where attention is confined: consecutive rows that belong together, in ascending position."""

    # First row of each segment and the end of the last, int32 [segments + 1]. Segments may be empty
    offsets: torch.Tensor
    longest: int  # upper bound of the length of a segment

    def pad(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return [rows, heads, d] as rectangles [segments, heads, longest, d], zeros behind the rows of a segment.

        Short and long segments come in rectangles of their own, in which there is less to pad.
        """
        shapes, places = self.rectangles
        sizes = [segments * length for segments, length in shapes]
        padded = rows.new_zeros(sum(sizes), *rows.shape[1:]).index_copy_(0, places, rows)
        return tuple(
            part.view(*shape, *rows.shape[1:]).transpose(1, 2)
            for part, shape in zip(padded.split(sizes), shapes, strict=True)
        )

    def unpad(self, rectangles: Iterable[torch.Tensor]) -> torch.Tensor:
        """Undo `pad`."""
        padded = torch.cat([rectangle.transpose(1, 2).flatten(0, 1) for rectangle in rectangles])
        return padded.index_select(0, self.rectangles[1])

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """What kernels have worked out of the segments, kept for their next call."""
        return {}

    @functools.cached_property
    def rectangles(self) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """Segments and length of each rectangle, and each row's place in them, laid end to end."""
        lengths = self.offsets.diff().long()
        lengths = lengths[lengths > 0]
        first, shapes = torch.empty_like(lengths), []
        start = 0
        for part in lengths.argsort().tensor_split(_RECTANGLES):
            length = int(lengths[part].max()) if len(part) > 0 else 0
            first[part] = start + length * torch.arange(len(part), device=lengths.device)
            shapes.append((len(part), length))
            start += len(part) * length
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        within = torch.arange(len(segment), device=lengths.device) - (lengths.cumsum(0) - lengths)[segment]
        return [shape for shape in shapes if shape[0] > 0] or shapes[:1], first[segment] + within
