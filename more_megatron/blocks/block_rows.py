"""The rows that recurrent blocks work on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from more_megatron.blocks.backends import RowGroups
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.segments import Segments

__all__ = ["BlockRows"]


@dataclass(frozen=True)
class BlockRows:
    """Rows sorted by group.

    Attributes:
        groups: Where the rows of each group are.
        group_ids: Local number of each row's group, int64 [rows].
        segments: Rows that attend to each other.
        positions: Position of each row in its sequence, int64 [rows].
        sample_ids: Position of each row's sequence in the stream of samples, int64 [rows].
        rotary_pos_emb: Angles of the rotary embedding, [s, 1, 1, d]; None without one.
        is_padding: True for padding rows, bool [rows, 1]; None without padding.
    """

    groups: RowGroups
    group_ids: torch.Tensor
    segments: Segments
    positions: torch.Tensor
    sample_ids: torch.Tensor
    rotary_pos_emb: torch.Tensor | None
    is_padding: torch.Tensor | None = None

    def as_one_group(self) -> BlockRows:
        """Return the rows for one block that all groups share; they still attend within their segments only."""
        return dataclasses.replace(self, groups=self.groups.as_one(), group_ids=torch.zeros_like(self.group_ids))

    def padded(self, multiple: int | None) -> tuple[BlockRows, RowPadding]:
        """Return the rows with padding after each group, and the padding.

        Args:
            multiple: As for `RowPadding.of`. The segments must be as `RowPadding.pad_segments` wants them.
        """
        padding = RowPadding.of(self.groups, multiple)
        if padding.places is None:
            return self, padding
        sizes = torch.tensor(padding.groups.sizes).to(self.positions.device)
        groups = torch.arange(len(sizes), device=sizes.device)
        is_padding = torch.ones(sum(padding.groups.sizes), 1, dtype=torch.bool, device=sizes.device)
        rows = dataclasses.replace(
            self,
            groups=padding.groups,
            group_ids=torch.repeat_interleave(groups, sizes, output_size=len(is_padding)),
            segments=padding.pad_segments(self.segments),
            positions=padding.pad(self.positions),
            sample_ids=padding.pad(self.sample_ids),
            is_padding=is_padding.index_fill(0, padding.places, False),
        )
        return rows, padding
