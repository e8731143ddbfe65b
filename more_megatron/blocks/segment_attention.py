"""Causal attention within segments of any length, the same on both backends.

Transformer Engine has kernels for segments too; but where cuDNN does not offer them, it pads every segment to the
longest and stores all scores, at seven times the time and half of the device's memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from more_megatron.blocks.rows import Segments

# Beyond as many scores a row, which are all stored, the fused kernel is faster.
_MOST_SCORES = 64


def segment_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attend causally within each segment, all segments together; return [rows, heads, head_dim].

    Args:
        query: [rows, heads, head_dim]; the rows of a segment are consecutive and in ascending position.
        key: [rows, groups, head_dim].
        value: [rows, groups, head_dim].
        segments: Where the segments are.
    """
    if _varlen_can(query):
        return _varlen_attention(query, key, value, segments)
    if are_short(query, segments):
        counts = query.size(1), key.size(1)
        if counts not in segments.derived:
            segments.derived[counts] = _Tiles.of(segments, *counts)
        return _ShortSegmentAttention.apply(query, key, value, segments.derived[counts])
    # Padding comes after the rows of a segment, so the causal mask hides it.
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=query.size(1) != key.size(1)
    )
    return segments.unpad(map(attend, *(segments.pad(x) for x in (query, key, value))))


def _varlen_can(query: torch.Tensor) -> bool:
    """Return whether PyTorch's attention for segments of any length, a flash kernel, takes these heads."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
        and query.size(0) > 0
    )


def _varlen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    # Imported here: it imports PyTorch's compiler, which takes a second.
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = segments.offsets, segments.longest
    shared = query.size(1) // key.size(1)
    options: dict[str, Any] = {}
    if shared > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    context: Any = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0), **options)
    return context


def are_short(query: torch.Tensor, segments: Segments) -> bool:
    """Return whether attention of queries, [rows, heads, head_dim], is faster here than in PyTorch's fused kernel."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or query.size(0) == 0:
        return False
    shapes, _ = segments.rectangles
    rows = sum(number * length for number, length in shapes)
    return sum(number * length**2 for number, length in shapes) <= _MOST_SCORES * rows


@dataclass(frozen=True)
class _Tiles:
    """Heads of rows in rectangles of segments, [heads * segments, length, head_dim], one after the other."""

    shapes: list[tuple[int, int]]  # segments times heads, and length, of each rectangle
    places: torch.Tensor  # place of each head of each row, int64 [rows * heads]
    query_heads: torch.Tensor  # the head of a row that is at each place, int64 [places]; any where there is padding
    key_heads: torch.Tensor  # likewise among the heads of keys and values

    @classmethod
    def of(cls, segments: Segments, heads: int, groups: int) -> _Tiles:
        shapes, rows = segments.rectangles
        sizes = torch.tensor([number * length for number, length in shapes])
        ends = sizes.cumsum(0)
        rectangle = torch.bucketize(rows, ends, right=True)
        first, size = (ends - sizes)[rectangle], sizes[rectangle]
        head = torch.arange(heads)
        places = ((first * heads + rows - first).unsqueeze(1) + size.unsqueeze(1) * head).flatten()
        query_heads = torch.zeros(int(ends[-1]) * heads, dtype=torch.int64)
        query_heads[places] = torch.arange(len(places))
        row, head = query_heads // heads, query_heads % heads
        key_heads = row * groups + head // (heads // groups)
        return cls([(heads * number, length) for number, length in shapes], places, query_heads, key_heads)

    def rectangles(self, *flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the rectangles of tensors [places, head_dim], those of the same shape together."""
        parts = (x.split([number * length for number, length in self.shapes]) for x in flat)
        for shape, *same in zip(self.shapes, *parts, strict=True):
            yield tuple(x.view(*shape, x.size(-1)) for x in same)


class _ShortSegmentAttention(torch.autograd.Function):
    """A batched product for all heads of many segments on a CPU.

    PyTorch's fused kernel takes a head of a segment at a time, in blocks that a few dozen rows do not fill.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
        # Padding comes after the rows of a segment, so the causal mask hides it.
        scale = query.size(-1) ** -0.5
        padded = [_heads(query).index_select(0, tiles.query_heads).mul_(scale)]
        padded += [_heads(x).index_select(0, tiles.key_heads) for x in (key, value)]
        context, weights = torch.empty_like(padded[0]), []
        for q, k, v, out in tiles.rectangles(*padded, context):
            mask = q.new_full((q.size(1), q.size(1)), -torch.inf).triu_(1)
            weights.append(torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(dim=-1))
            torch.bmm(weights[-1], v, out=out)
        ctx.tiles, ctx.groups, ctx.scale = tiles, key.size(1), scale
        ctx.save_for_backward(*padded, *weights)
        return context.index_select(0, tiles.places).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tiles: _Tiles = ctx.tiles
        # Read once: recomputation does not give them twice.
        saved = ctx.saved_tensors
        padded, all_weights = saved[:3], saved[3:]
        grads = [torch.empty_like(x) for x in padded]
        # What padding attends to gets no gradient from it.
        grad_context = torch.zeros_like(padded[0]).index_copy_(0, tiles.places, _heads(grad))
        rectangles = tiles.rectangles(*padded, grad_context, *grads)
        for weights, (q, k, v, grad_out, grad_q, grad_k, grad_v) in zip(all_weights, rectangles, strict=True):
            torch.bmm(weights.transpose(1, 2), grad_out, out=grad_v)
            grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
        grad_q, grad_k, grad_v = (x.index_select(0, tiles.places).view(grad.shape) for x in grads)
        return grad_q.mul_(ctx.scale), _sum_shared(grad_k, ctx.groups), _sum_shared(grad_v, ctx.groups), None


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.size(-1))


def _sum_shared(grad: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the gradient of keys or values, [rows, groups, d], from those of the heads that share them."""
    return grad if grad.size(1) == groups else grad.unflatten(1, (groups, -1)).sum(dim=2)
