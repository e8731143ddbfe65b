"""Building blocks by backend: `local` (plain PyTorch) and `te` (Transformer Engine)."""

from more_megatron.blocks.backends.local import Backend, LocalAttention, LocalNorm, Weights, grouped_linear
from more_megatron.config import MoREConfig

__all__ = ["Backend", "LocalAttention", "LocalNorm", "Weights", "backend_of", "grouped_linear"]


def backend_of(config: MoREConfig) -> Backend:
    """Return the backend that `config.transformer_impl` names: the one place that asks which a run uses."""
    if config.transformer_impl == "transformer_engine":
        # Imported only where it is asked for: without the package it cannot be.
        from more_megatron.blocks.backends.te import TransformerEngineBackend

        return TransformerEngineBackend()
    return Backend()
