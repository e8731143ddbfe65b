"""What experts that mix tokens receive."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from more_megatron.blocks.backends import RowGroups
from more_megatron.blocks.block_rows import BlockRows
from more_megatron.blocks.rows import RoutedRows
from more_megatron.model.depth import Depth

__all__ = ["ExpertInputs"]


@dataclass(frozen=True)
class ExpertInputs:
    """Rows for the local experts of a rank, sorted by expert, sequence and position.

    Attributes:
        hidden_states: [rows, h].
        probs: Routing probability of each row, [rows].
        rows: Which rows they are.
        depth: Recurrence steps.
        noisy: Whether initial states depend on the sample, as in training.
        rotary_pos_emb: Angles of the rotary embedding, [s, 1, 1, d]; None without one.
    """

    hidden_states: torch.Tensor
    probs: torch.Tensor
    rows: RoutedRows
    depth: Depth
    noisy: bool
    rotary_pos_emb: torch.Tensor | None

    def by_expert(self) -> BlockRows:
        """Return the rows for blocks that each expert has one of."""
        rows = self.rows
        return BlockRows(
            RowGroups(rows.expert_ends),
            rows.experts,
            rows.segments,
            rows.positions,
            rows.sample_ids,
            self.rotary_pos_emb,
        )

    def weigh(self, output: torch.Tensor) -> torch.Tensor:
        """Return the output times the routing probabilities, in the type of the output."""
        return (output * self.probs.unsqueeze(-1)).to(output.dtype)
