"""The rows that experts work on: dispatched tokens, sorted by expert, sequence and position."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from more_megatron.blocks.backends import RowGroups
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.segments import Segments

__all__ = ["Rows"]


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
        return dataclasses.replace(self, groups=self.groups.as_one())

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
