"""Building blocks by backend: `local` (plain PyTorch) and `te` (Transformer Engine).

`backend_of` is the one place that asks which backend a run uses.
"""

from __future__ import annotations

from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.blocks.backends.interface import Backend, Piece, RowGroups, SandwichParts, Weights
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
    "Piece",
    "RowGroups",
    "SandwichParts",
    "Weights",
    "backend_of",
    "final_norm",
    "grouped_linear",
    "layer_submodules",
    "sandwich_parts",
    "segment_attention",
]


def backend_of(config: MoREConfig) -> Backend:
    """Return the backend that `config.transformer_impl` names."""
    if config.transformer_impl == "transformer_engine":
        # Imported only where it is asked for: without the package it cannot be.
        from more_megatron.blocks.backends.te import TransformerEngineBackend

        return TransformerEngineBackend()
    return LocalBackend()


def layer_submodules(config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
    """Return the submodules of one transformer layer on the backend of `config`.

    Args:
        config: Model configuration.
        moe: Whether the layer's feed-forward part is a mixture of experts.
    """
    return backend_of(config).layer_submodules(config, moe)


def sandwich_parts(config: MoREConfig) -> SandwichParts:
    """Return the parts of a sandwich block on the backend of `config`."""
    return backend_of(config).sandwich_parts()


def final_norm(config: MoREConfig) -> LayerNormBuilder:
    """Return the norm after the last layer on the backend of `config`."""
    return backend_of(config).norm()
