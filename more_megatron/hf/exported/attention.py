"""Attention, and how it is computed where rows are some tokens of several sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RowMask", "attend"]


@dataclass(frozen=True)
class RowMask:
    """The keys that each row sees.

    Attributes:
        visible: True for these, [rows, keys].
        sequence: The sequence that each row is of, [rows].
    """

    visible: Tensor
    sequence: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | RowMask | None) -> Tensor:
    """Return the attention of [b, heads, rows, d] to [b, groups, keys, d] where the mask is True; None: causal."""
    if isinstance(mask, RowMask):
        return _attend_by_row(query, key, value, mask)
    is_causal, is_grouped = mask is None and query.size(2) > 1, query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)


def _attend_by_row(query: Tensor, key: Tensor, value: Tensor, rows: RowMask) -> Tensor:
    """Return the attention of [1, heads, rows, d] to [b, groups, keys, d], [1, heads, rows, d]."""
    used, own, counts = rows.sequence.unique(return_inverse=True, return_counts=True)
    # The rows of a sequence side by side, as many as the longest has.
    order = own.argsort(stable=True)
    number = torch.empty_like(own)
    number[order] = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own[order]]
    shape = (len(used), int(counts.max()))
    padded = query.new_zeros(*shape, query.size(1), query.size(3))
    padded = padded.index_put((own, number), query[0].transpose(0, 1))
    mask = torch.ones(*shape, rows.visible.size(1), dtype=torch.bool, device=query.device)
    mask[own, number] = rows.visible
    if len(used) < len(key):
        key, value = key[used], value[used]
    output = attend(padded.transpose(1, 2), key, value, mask.unsqueeze(1))
    return output.transpose(1, 2)[own, number].transpose(0, 1).unsqueeze(0)
