"""Rows that hold several documents: positions that begin anew tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Memory

__all__ = ["find_documents"]


def find_documents(positions: Tensor, padding: Tensor | None, memory: Memory, past: int) -> Tensor | None:
    """Return the number of each token's document, [b, T], where a row holds several.

    A document begins where a position is not the one after the position before it. Packing collators send such
    positions, and transformers' own models keep these documents apart, too.

    Args:
        positions: Positions that a call was given, [b or 1, s].
        padding: True for padding, [b, T].
        memory: The cache, which keeps the documents of the tokens before these.
        past: Number of tokens in the cache.
    """
    if past > 0 and not memory.holds("documents"):
        return None
    begins = torch.zeros_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if padding is not None:
        begins = begins & ~padding[:, past:]
        begins[:, 1:] &= ~padding[:, past:-1]
    if past > 0:
        return _continued(positions, begins, memory)
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    documents = begins.long().cumsum(-1)
    _keep(positions, documents, memory)
    return documents


def _continued(positions: Tensor, begins: Tensor, memory: Memory) -> Tensor:
    """Return the documents of all tokens, where those before these are in the cache."""
    nothing = positions[:, :0]
    known_positions, known_documents = _keep(nothing, nothing, memory)
    begins[:, 0] = positions[:, 0] != known_positions[:, -1] + 1
    documents = known_documents[:, -1:] + begins.long().cumsum(-1)
    return _keep(positions.expand_as(documents), documents, memory)[1]


def _keep(positions: Tensor, documents: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """Append to the cache and return positions and documents of all tokens, [b, T] each."""
    kept = memory.extend("documents", *(part[:, None, :, None] for part in (positions, documents)))
    return kept[0][:, 0, :, 0], kept[1][:, 0, :, 0]
