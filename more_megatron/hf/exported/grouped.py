"""Products of groups of rows with a matrix for each group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["grouped_linear"]


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Apply to each group of rows, [rows, in] sorted by group, its map of [groups, out, in], all groups at once.

    `ends` is the end of each group's rows, int32 [groups].
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if _has_grouped_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return _traced_linear(rows, weight, ends) if torch.compiler.is_compiling() else _padded_linear(rows, weight, ends)


def _has_grouped_kernel(rows: Tensor, weight: Tensor) -> bool:
    known = rows.device.type in ("cpu", "cuda") and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (hasattr(F, "grouped_mm") and known):
        return False
    # The kernels want rows of weights and of activations to begin at multiples of 16 bytes.
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if torch.compiler.is_compiling():
        # A tracer sees no addresses; compiled code copies inputs that are not aligned. It knows the kernel of one type.
        aligned = aligned and rows.dtype == torch.bfloat16
    else:
        aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in (rows, weight))
    return aligned and (rows.device.type == "cpu" or torch.cuda.get_device_capability(rows.device) >= (8, 0))


def _padded_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_linear` as a batched product over groups padded to the size of the largest."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    longest, group = int(counts.max()), _groups(rows, ends)
    places = group * longest + torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[group]
    padded = rows.new_zeros(len(counts) * longest, rows.size(1)).index_copy(0, places, rows)
    return torch.bmm(padded.view(len(counts), longest, -1), weight.transpose(1, 2)).flatten(0, 1)[places]


def _traced_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_linear` by applying every map to all rows: no size depends on how many rows a group has."""
    group = _groups(rows, ends).unsqueeze(1)
    output = F.linear(rows, weight[0])
    for number in range(1, len(weight)):
        output = torch.where(group == number, F.linear(rows, weight[number]), output)
    return output


def _groups(rows: Tensor, ends: Tensor) -> Tensor:
    """Return the group of each row."""
    return torch.searchsorted(ends, torch.arange(len(rows), device=rows.device, dtype=ends.dtype), right=True)
