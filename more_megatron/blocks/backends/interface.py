"""What a backend provides. Systems call these methods and do not know which backend answers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.config import MoREConfig

__all__ = ["Backend", "Piece", "RowGroups", "SandwichParts", "Weights", "parameter_device"]

# Weights of a linear map or of a norm. Assigned to an attribute of a module they become its parameter or its submodule.
Weights = torch.nn.Parameter | torch.nn.Module


@dataclass(frozen=True)
class RowGroups:
    """Rows sorted by group: where the rows of each group end.

    Attributes:
        ends: End of each group's rows, int32 [groups].
    """

    ends: torch.Tensor

    @classmethod
    def of_sizes(cls, sizes: list[int], device: torch.device) -> RowGroups:
        """Return groups whose sizes are known on the host."""
        ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        groups = cls(ends.to(device, non_blocking=True))
        groups.__dict__["sizes"] = sizes  # what the property would find out
        return groups

    @classmethod
    def of_counts(cls, counts: torch.Tensor, device: torch.device) -> RowGroups:
        """Return groups of as many rows as a dispatcher has counted, on the device or, without waiting, on the host.

        Args:
            counts: Number of rows of each group, [groups].
            device: Where the rows are.
        """
        if counts.device == device:
            return cls(counts.cumsum(0).to(torch.int32))
        return cls.of_sizes(counts.tolist(), device)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each group, on the host: waits for the device, once."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def members(self, number: int) -> torch.Tensor:
        """Return which of `number` rows are which group's, bool [rows, groups]."""
        rows = torch.arange(number, device=self.ends.device).unsqueeze(1)
        return (rows < self.ends) & (rows >= torch.nn.functional.pad(self.ends[:-1], (1, 0)))

    def as_one(self) -> RowGroups:
        """Return the same rows as one group."""
        return RowGroups(self.ends[-1:])


@dataclass(frozen=True)
class Piece:
    """What one parameter holds of the weights of all groups.

    Attributes:
        parameter: The parameter.
        group: Number of the group among those on this rank; None if it holds all, stacked along the first dimension.
        column: Which part of the input dimension it holds.
        columns: Number of these parts.
    """

    parameter: torch.nn.Parameter
    group: int | None = None
    column: int = 0
    columns: int = 1


@dataclass(frozen=True)
class SandwichParts:
    """Builders of the parts of a sandwich block over whole sequences.

    Attributes:
        norm: Builds a norm.
        attention: Specification of causal self-attention, without a norm of its own.
        mlp: Linear layers of a gated MLP, without a norm of its own.
    """

    norm: LayerNormBuilder
    attention: ModuleSpec
    mlp: MLPSubmodules

    @classmethod
    def of(cls, norm: LayerNormBuilder, core_attention: Any, column_linear: Any, row_linear: Any) -> SandwichParts:
        """Return the parts, given the classes that they are built from."""
        attention = SelfAttentionSubmodules(
            linear_qkv=column_linear,
            core_attention=core_attention,
            linear_proj=row_linear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        )
        return cls(
            norm=norm,
            attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            mlp=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear),
        )


class Backend(ABC):
    """Building blocks of layers over sequences, and of experts over rows."""

    @abstractmethod
    def layer_submodules(self, config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
        """Return the submodules of one transformer layer.

        Args:
            config: Model configuration.
            moe: Whether the layer's feed-forward part is a mixture of experts.
        """

    @abstractmethod
    def sandwich_parts(self) -> SandwichParts:
        """Return the parts of a sandwich block over whole sequences."""

    @abstractmethod
    def norm(self) -> LayerNormBuilder:
        """Return the builder of norms over whole sequences."""

    @abstractmethod
    def looped(self, config: MoREConfig) -> MoREConfig:
        """Return the configuration for modules of Megatron's that run several times in one forward pass."""

    @abstractmethod
    def row_multiple(self, config: MoREConfig) -> int | None:
        """Return the number of which each group's rows must be a multiple in the pass that is under way.

        At least that many rows there must be in all. None: the rows are taken as they come.
        """

    @abstractmethod
    def linear_weights(self, config: MoREConfig, groups: int, shape: tuple[int, ...], columns: int = 1) -> Weights:
        """Return the weights of a linear map without bias for each group, not yet drawn.

        Args:
            config: Model configuration.
            groups: Number of groups.
            shape: Shape of one group's weight on this rank; the last dimension is the input.
            columns: Number of equal parts of the input that are multiplied separately; `columns` returns them.
        """

    @abstractmethod
    def pieces(self, weights: Weights) -> Iterator[Piece]:
        """Yield the parameters of `linear_weights`."""

    @abstractmethod
    def columns(self, weights: Weights, number: int) -> tuple[Any, ...]:
        """Return the weights for each of the `number` parts of the input, as `linear` takes them."""

    @abstractmethod
    def linear(self, rows: torch.Tensor, weights: Any, groups: RowGroups) -> torch.Tensor:
        """Apply to the rows of each group a linear map of its own.

        Args:
            rows: [rows, in], sorted by group.
            weights: From `linear_weights`, or one of its `columns`.
            groups: Where the groups are.

        Returns:
            [rows, out]; more dimensions of the weight are flattened.
        """

    @abstractmethod
    def stacked(self, weights: Weights) -> torch.Tensor:
        """Return the weights as a tensor that carries gradient, [groups, ...]."""

    @abstractmethod
    def row_norm(self, config: MoREConfig) -> torch.nn.Module | None:
        """Return an RMSNorm over rows with one weight for all of them; None if the caller shall compute it."""


def parameter_device(config: MoREConfig) -> Any:
    """Return where parameters are created."""
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
