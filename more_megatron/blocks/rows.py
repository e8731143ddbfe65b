"""The rows that reached an expert rank, in the order in which experts that mix tokens need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from more_megatron.blocks.segments import Segments

__all__ = ["RoutedRows"]


@dataclass(frozen=True)
class RoutedRows:
    """Dispatched tokens sorted by expert, then sequence, then position.

    Attributes:
        order: For each sorted row the dispatched row it came from, int64 [rows].
        restore: For each dispatched row the sorted row it became, int64 [rows].
        expert_ends: End of each local expert's rows, int32 [local experts].
        experts: Local expert of each sorted row, int64 [rows].
        sample_ids: Position of each sorted row's sequence in the stream of samples, int64 [rows].
        positions: Position of each sorted row in its sequence, int64 [rows].
        segments: One segment for each (expert, sequence).
    """

    order: torch.Tensor
    restore: torch.Tensor
    expert_ends: torch.Tensor
    experts: torch.Tensor
    sample_ids: torch.Tensor
    positions: torch.Tensor
    segments: Segments

    @classmethod
    def sort(
        cls, coordinates: torch.Tensor, tokens_per_expert: torch.Tensor, num_sequences: int, seq_length: int
    ) -> RoutedRows:
        """Sort the rows that a dispatcher handed to the local experts.

        Args:
            coordinates: Sequence on this expert rank, position, sample id of each row, int64 [rows, 3]; the rows are
                grouped by expert.
            tokens_per_expert: Number of rows of each local expert, [local experts].
            num_sequences: Number of sequences whose tokens can reach this rank.
            seq_length: Length of a sequence.
        """
        device = coordinates.device
        counts = torch.as_tensor(tokens_per_expert).to(device=device, dtype=torch.int64)
        experts = torch.repeat_interleave(
            torch.arange(len(counts), device=device), counts, output_size=coordinates.size(0)
        )
        sequences, positions, sample_ids = coordinates.unbind(1)
        segment = experts * num_sequences + sequences
        order = torch.argsort(segment * seq_length + positions)
        restore = torch.empty_like(order)
        restore[order] = torch.arange(len(order), device=device)
        lengths = torch.bincount(segment, minlength=len(counts) * num_sequences)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(
            order=order,
            restore=restore,
            expert_ends=counts.cumsum(0).to(torch.int32),
            experts=experts,
            sample_ids=sample_ids[order],
            positions=positions[order],
            segments=Segments(offsets, seq_length),
        )
