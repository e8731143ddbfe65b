"""Rows that fill each group up to a number that a kernel wants, laid once around a whole recurrence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from more_megatron.blocks.backends import RowGroups
from more_megatron.blocks.segments import Segments

__all__ = ["RowPadding"]


@dataclass(frozen=True)
class RowPadding:
    """Where the rows of each group lie once padding follows them. Padding rows are zero and are dropped again."""

    groups: RowGroups  # where the groups are, with padding
    places: torch.Tensor | None = None  # for each row its place among all rows, int64 [rows]; None without padding
    shifts: torch.Tensor | None = None  # how far the rows of each group moved, int32 [groups]
    longest: int = 0  # largest number of padding rows of a group

    @classmethod
    def of(cls, groups: RowGroups, multiple: int | None) -> RowPadding:
        """Return the padding after which each group's number of rows is a multiple, and there is a row at all.

        Without a multiple there is no padding.
        """
        if multiple is None:
            return cls(groups)
        sizes = groups.sizes
        padded = [-(-size // multiple) * multiple for size in sizes]
        if sum(padded) == 0:
            padded[0] = multiple
        if padded == sizes:
            return cls(groups)
        device = groups.ends.device
        padded_groups = RowGroups.of_sizes(padded, device)
        # How much padding lies before the end of each group.
        padding = padded_groups.ends - groups.ends
        shifts = torch.nn.functional.pad(padding[:-1], (1, 0))
        lengths = torch.tensor(sizes).to(device, non_blocking=True)
        moved = torch.repeat_interleave(shifts, lengths, output_size=sum(sizes))
        places = torch.arange(sum(sizes), device=device) + moved
        longest = max(new - old for new, old in zip(padded, sizes, strict=True))
        return cls(padded_groups, places, shifts, longest)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [rows, ...] with zeros where padding is."""
        if self.places is None:
            return rows
        padded = rows.new_zeros(sum(self.groups.sizes), *rows.shape[1:])
        return padded.index_copy(0, self.places, rows)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Undo `pad`."""
        return padded if self.places is None else padded.index_select(0, self.places)

    def is_padding(self) -> torch.Tensor | None:
        """Return True for each row that is padding, [rows]; None without padding."""
        if self.places is None:
            return None
        padding = torch.ones(sum(self.groups.sizes), dtype=torch.bool, device=self.places.device)
        return padding.index_fill(0, self.places, False)

    def pad_segments(self, segments: Segments) -> Segments:
        """Return the segments with one more behind those of each group, of its padding: no row attends to padding.

        Each group has the same number of segments, and they are sorted by group.
        """
        if self.shifts is None:
            return segments
        ends = segments.offsets[1:].view(len(self.shifts), -1) + self.shifts.unsqueeze(1)
        ends = torch.cat((ends, self.groups.ends.unsqueeze(1)), dim=1).flatten()
        return Segments(torch.nn.functional.pad(ends, (1, 0)), max(segments.longest, self.longest))
