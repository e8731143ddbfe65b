"""Building blocks by backend: `local` (plain PyTorch) and `te` (Transformer Engine).

`backend_of` is the one place that asks which backend a run uses.
"""

from __future__ import annotations

from more_megatron.blocks.backends.interface import Backend, RowGroups, Weights
from more_megatron.blocks.backends.local import (
    LocalAttention,
    LocalBackend,
    LocalNorm,
    grouped_linear,
    segment_attention,
)
from more_megatron.config import MoREConfig

__all__ = [
    "Backend",
    "LocalAttention",
    "LocalNorm",
    "RowGroups",
    "Weights",
    "backend_of",
    "grouped_linear",
    "segment_attention",
]


def backend_of(config: MoREConfig) -> Backend:
    """Return the backend that `config.transformer_impl` names."""
    if config.transformer_impl == "transformer_engine":
        # Imported only where it is asked for: without the package it cannot be.
        from more_megatron.blocks.backends.te import TransformerEngineBackend

        return TransformerEngineBackend()
    return LocalBackend()
