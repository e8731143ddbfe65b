"""Attention where rows are some tokens of several sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RowMask"]


@dataclass(frozen=True)
class RowMask:
    """The keys that each row sees.

    Attributes:
        visible: True for these, [rows, keys].
        sequence: The sequence that each row is of, [rows].
    """

    visible: Tensor
    sequence: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of [1, heads, rows, d] to [b, groups, keys, d], [1, heads, rows, d]."""
        used, own, counts = self.sequence.unique(return_inverse=True, return_counts=True)
        # The rows of a sequence side by side, as many as the longest has.
        order = own.argsort(stable=True)
        number = torch.empty_like(own)
        number[order] = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own[order]]
        shape = (len(used), int(counts.max()))
        padded = query.new_zeros(*shape, query.size(1), query.size(3))
        padded = padded.index_put((own, number), query[0].transpose(0, 1))
        mask = torch.ones(*shape, self.visible.size(1), dtype=torch.bool, device=query.device)
        mask[own, number] = self.visible
        if len(used) < len(key):
            key, value = key[used], value[used]
        output = F.scaled_dot_product_attention(
            padded.transpose(1, 2), key, value, attn_mask=mask.unsqueeze(1), enable_gqa=query.size(1) != key.size(1)
        )
        return output.transpose(1, 2)[own, number].transpose(0, 1).unsqueeze(0)
