"""What layers are made of: norms, MLPs, products with a matrix for each expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .fields import Config


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` in float32 (arXiv 1910.07467); rows may have weights of their own."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def build_norm(config: Config, size: int | None = None) -> nn.Module:
    """Return a norm of the kind that the model has, of hidden states unless a size is given."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size if size is None else size, eps=config.norm_eps)


class MoREMLP(nn.Module):
    """Feed-forward network of a layer without experts, or shared expert; gated or not.

    It has biases if all linear maps of the model have them, or if `bias` says so.
    """

    def __init__(self, config: Config, width: int, bias: bool | None = None) -> None:
        super().__init__()
        hidden = config.hidden_size
        bias = config.linear_bias if bias is None else bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., h]."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Apply to each group of rows, [rows, in] sorted by group, its map of [groups, out, in], all groups at once.

    `ends` is the end of each group's rows, int32 [groups].
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if _has_grouped_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    group = torch.searchsorted(ends, torch.arange(rows.size(0), device=rows.device, dtype=ends.dtype), right=True)
    if not torch.compiler.is_compiling():
        return _padded_linear(rows, weight, ends, group)
    # Every map is applied to all rows: no size depends on how many rows a group has.
    output = F.linear(rows, weight[0])
    for number in range(1, len(weight)):
        output = torch.where(group.unsqueeze(1) == number, F.linear(rows, weight[number]), output)
    return output


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


def _padded_linear(rows: Tensor, weight: Tensor, ends: Tensor, group: Tensor) -> Tensor:
    """Compute `grouped_linear` as a batched product over groups padded to the size of the largest."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    longest = int(counts.max())
    places = group * longest + torch.arange(rows.size(0), device=rows.device) - (counts.cumsum(0) - counts)[group]
    padded = rows.new_zeros(len(counts) * longest, rows.size(1)).index_copy(0, places, rows)
    return torch.bmm(padded.view(len(counts), longest, -1), weight.transpose(1, 2)).flatten(0, 1)[places]
