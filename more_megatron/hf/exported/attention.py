"""Attention, also where rows are tokens of several sequences, and positions: rotary ones and sinusoids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .fields import Config

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of each position, [b or 1, s, planes] each."""


@dataclass(frozen=True)
class RowMask:
    """The keys that each row sees."""

    visible: Tensor  # True for these, [rows, keys]
    sequence: Tensor  # the sequence that each row is of, [rows]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | RowMask | None) -> Tensor:
    """Return the attention of [b, heads, rows, d] to [b, groups, keys, d] where the mask is True; None: causal.

    Under a `RowMask` the rows are of any of the b sequences, [1, heads, rows, d].
    """
    if isinstance(mask, RowMask):
        rows, outputs = [], []
        for number in mask.sequence.unique():
            own, sequence = (mask.sequence == number).nonzero().flatten(), slice(number, number + 1)
            rows.append(own)
            outputs.append(attend(query[:, :, own], key[sequence], value[sequence], mask.visible[own][None, None]))
        return torch.cat(outputs, dim=2)[:, :, torch.cat(rows).argsort()]
    # In this order: of a size that a tracer does not know, `>` is no bool, which the kernel wants.
    is_causal, is_grouped = query.size(2) > 1 and mask is None, query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)


def rotation(config: Config, positions: Tensor) -> Rotation | None:
    """Return cosine and sine at positions [b or 1, s] (Su et al., arXiv 2104.09864); None without rotary embedding."""
    if config.position_embedding != "rope":
        return None
    size = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling_factor is not None:
        frequencies = _stretch(frequencies, config.rope_scaling_factor)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def _stretch(frequencies: Tensor, factor: float, context: int = 8192) -> Tensor:
    """Slow down the frequencies that turn less than four times in the context, as Llama 3.1 does."""
    turns = context * frequencies / (2.0 * math.pi)
    kept = ((turns - 1.0) / 3.0).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def rotate(x: Tensor, angles: Rotation | None, interleaved: bool) -> Tensor:
    """Rotate the leading channels of [b, ..., s, d]; a plane is two neighbouring channels, or one of each half."""
    if angles is None:
        return x
    batch, length, planes = angles[0].shape
    cos, sin = (part.to(x.dtype).view(batch, *(1,) * (x.dim() - 3), length, planes) for part in angles)
    turned, rest = x[..., : 2 * planes], x[..., 2 * planes :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def sinusoid(places: Tensor, channels: int) -> Tensor:
    """Return the sines, then the cosines, of places at wavelengths that grow geometrically; float32 [..., channels]."""
    pairs = channels // 2
    exponent = torch.arange(pairs, dtype=torch.float32, device=places.device) / max(pairs - 1, 1)
    angles = places.float().unsqueeze(-1) * torch.exp(exponent * -math.log(1e4))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
