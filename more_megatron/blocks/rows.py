"""The rows that experts work on: dispatched tokens, sorted by expert, sequence and position.

`Rows` says which there are; it is made of `RowGroups`, the rows of each expert, and `Segments`, those of each expert
and sequence. `RowPadding` fills groups up to a number that a kernel wants, once around a whole recurrence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

# Rectangles of each padded layout: with more of them there is less padding, and there are more calls.
_RECTANGLES = 4


@dataclass(frozen=True)
class RowGroups:
    """Rows sorted by group; `ends` is where the rows of each group end, int32 [groups]."""

    ends: torch.Tensor

    @classmethod
    def of_sizes(cls, sizes: list[int], device: torch.device) -> RowGroups:
        """Return groups whose sizes are known on the host."""
        ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        groups = cls(ends.to(device, non_blocking=True))
        groups.__dict__["sizes"] = sizes  # what the property would find out
        return groups

    @classmethod
    def of_counts(cls, counts: torch.Tensor, device: torch.device) -> RowGroups:
        """Return groups of as many rows as were counted, [groups], on the device or, without waiting, on the host."""
        if counts.device == device:
            return cls(counts.cumsum(0).to(torch.int32))
        return cls.of_sizes(counts.tolist(), device)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each group, on the host: waits for the device, once."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def members(self, number: int) -> torch.Tensor:
        """Return whether each row is of each group, bool [rows, groups], given how many rows there are in all."""
        if "_members" not in self.__dict__:
            rows = torch.arange(number, device=self.ends.device).unsqueeze(1)
            starts = torch.nn.functional.pad(self.ends[:-1], (1, 0))
            self.__dict__["_members"] = (rows < self.ends) & (rows >= starts)
        return self.__dict__["_members"]


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
        # Without any row one rectangle stays, which is empty.
        shapes = [shape for shape in shapes if shape[0] > 0] or shapes[:1]
        return shapes, first[segment] + within


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


@dataclass(frozen=True)
class Rows:
    """Which rows there are. Their hidden states, [rows, h], are passed beside them."""

    groups: RowGroups  # where the rows of each group are: of each local expert, or of the one block that experts share
    segments: Segments  # rows that belong to one sequence and group, in ascending position
    positions: torch.Tensor  # position of each row in its sequence, int64 [rows]
    sample_ids: torch.Tensor  # position of each row's sequence in the stream of samples, int64 [rows]; 0 in evaluation
    rotary_pos_emb: torch.Tensor | None = None  # angles of the rotary embedding, [s, 1, 1, d]; None without one
    is_padding: torch.Tensor | None = None  # True for padding rows, bool [rows, 1]; None without padding

    @classmethod
    def sort(
        cls,
        coordinates: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        num_sequences: int,
        seq_length: int,
        rotary_pos_emb: torch.Tensor | None = None,
    ) -> tuple[Rows, torch.Tensor]:
        """Sort the rows that a dispatcher handed to the local experts.

        Args:
            coordinates: Sequence on this expert rank, position, sample id of each row, int64 [rows, 3]; the rows are
                grouped by expert.
            tokens_per_expert: Number of rows of each local expert, [local experts].
            num_sequences: Number of sequences whose tokens can reach this rank.
            seq_length: Length of a sequence.
            rotary_pos_emb: As of `Rows`.

        Returns:
            The sorted rows, with a segment for each (expert, sequence), and which dispatched row each was, [rows].
        """
        device = coordinates.device
        tokens_per_expert = torch.as_tensor(tokens_per_expert)
        number = len(tokens_per_expert)
        counts = tokens_per_expert.to(device=device, dtype=torch.int64, non_blocking=True)
        experts = torch.repeat_interleave(torch.arange(number, device=device), counts, output_size=coordinates.size(0))
        sequences, positions, sample_ids = coordinates.unbind(1)
        segment = experts * num_sequences + sequences
        order = torch.argsort(segment * seq_length + positions)
        # Counting the rows of each segment would wait for the device.
        bounds = torch.arange(number * num_sequences + 1, device=device)
        offsets = torch.searchsorted(segment[order], bounds, out_int32=True)
        rows = cls(
            # The rows come grouped by expert: sorting moves none to another.
            groups=RowGroups.of_counts(tokens_per_expert, device),
            segments=Segments(offsets, seq_length),
            positions=positions[order],
            sample_ids=sample_ids[order],
            rotary_pos_emb=rotary_pos_emb,
        )
        return rows, order

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each row what its group has, [rows, h], given [groups, h]."""
        if not values.is_cuda:
            return values.index_select(0, self.group_ids)
        # The gradient of a selection adds thousands of rows to one in the type of the values, and in varying order.
        # That of a product adds them in float32.
        return self.groups.members(len(self.positions)).to(values.dtype) @ values

    @functools.cached_property
    def group_ids(self) -> torch.Tensor:
        """Local number of each row's group, int64 [rows]."""
        rows = torch.arange(len(self.positions), dtype=torch.int32, device=self.positions.device)
        return torch.searchsorted(self.groups.ends, rows, right=True)

    def as_one_group(self) -> Rows:
        """Return the rows for one block that all groups share; they still attend within their segments only."""
        return dataclasses.replace(self, groups=RowGroups(self.groups.ends[-1:]))

    def padded(self, multiple: int | None) -> tuple[Rows, RowPadding]:
        """Return the rows with padding after each group, as `RowPadding.of` lays it, and the padding."""
        padding = RowPadding.of(self.groups, multiple)
        is_padding = padding.is_padding()
        if is_padding is None:
            return self, padding
        rows = dataclasses.replace(
            self,
            groups=padding.groups,
            segments=padding.pad_segments(self.segments),
            positions=padding.pad(self.positions),
            sample_ids=padding.pad(self.sample_ids),
            is_padding=is_padding.unsqueeze(1),
        )
        return rows, padding
