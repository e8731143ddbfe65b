"""What a backend provides. Systems call these methods and do not know which backend answers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.config import MoREConfig

__all__ = ["Backend", "Piece", "RowGroups", "Weights"]

# Weights of a linear map or of a norm. Assigned to an attribute of a module they become its parameter or its submodule.
Weights = torch.nn.Parameter | torch.nn.Module


@dataclass(frozen=True)
class RowGroups:
    """Rows sorted by group; `ends` is where the rows of each group end, int32 [groups]."""

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
        """Return groups of as many rows as were counted, [groups], on the device or, without waiting, on the host."""
        if counts.device == device:
            return cls(counts.cumsum(0).to(torch.int32))
        return cls.of_sizes(counts.tolist(), device)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each group, on the host: waits for the device, once."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def members(self, number: int) -> torch.Tensor:
        """Return whether each row is of each group, bool [rows, groups], given how many rows there are in all."""
        if "_members" not in self.__dict__:
            rows = torch.arange(number, device=self.ends.device).unsqueeze(1)
            starts = torch.nn.functional.pad(self.ends[:-1], (1, 0))
            self.__dict__["_members"] = (rows < self.ends) & (rows >= starts)
        return self.__dict__["_members"]

    def as_one(self) -> RowGroups:
        """Return the same rows as one group."""
        return RowGroups(self.ends[-1:])


@dataclass(frozen=True)
class Piece:
    """What one parameter holds of the weights of all groups."""

    parameter: torch.nn.Parameter
    # Number of the group among those on this rank; None if it holds all, stacked along the first dimension
    group: int | None = None
    column: int = 0  # which part of the input dimension it holds
    columns: int = 1  # number of these parts


class Backend(ABC):
    """Building blocks of layers over sequences, and of experts over rows."""

    @abstractmethod
    def layer_submodules(self, config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
        """Return the submodules of one transformer layer; its feed-forward part is a mixture of experts, or not."""

    core_attention: ClassVar[Any]  # attention between queries, keys and values

    @abstractmethod
    def linears(self) -> tuple[Any, Any]:
        """Return the linear layers that are split by output and by input, without a norm of their own."""

    def attention(self) -> ModuleSpec:
        """Return causal self-attention over whole sequences, without a norm of its own."""
        column, row = self.linears()
        submodules = SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=self.core_attention,
            linear_proj=row,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        )
        return ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, submodules)

    def mlp(self) -> MLPSubmodules:
        """Return the linear layers of an MLP over whole sequences, without a norm of its own."""
        column, row = self.linears()
        return MLPSubmodules(linear_fc1=column, linear_fc2=row)

    @abstractmethod
    def norm(self) -> LayerNormBuilder:
        """Return the builder of norms over whole sequences."""

    @abstractmethod
    def looped(self, config: MoREConfig) -> MoREConfig:
        """Return the configuration for modules of Megatron's that run several times in one forward pass."""

    @abstractmethod
    def row_multiple(self, config: MoREConfig) -> int | None:
        """Return the number of which each group's rows must be a multiple in the pass that is under way.

        There must also be that many rows at least. None: the rows are taken as they come.
        """

    @abstractmethod
    def linear_weights(self, config: MoREConfig, groups: int, shape: tuple[int, ...], columns: int = 1) -> Weights:
        """Return the weights of a linear map without bias for each group, not yet drawn.

        Args:
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
        """Apply to the rows of each group, [rows, in], a linear map of its own.

        The weights are from `linear_weights`, or one of its `columns`; the result is [rows, out], more dimensions of
        the weight are flattened.
        """

    @abstractmethod
    def stacked(self, weights: Weights) -> torch.Tensor:
        """Return the weights as a tensor that carries gradient, [groups, ...]."""

    @abstractmethod
    def row_norm(self, config: MoREConfig) -> torch.nn.Module | None:
        """Return an RMSNorm over rows with one weight for all of them; None if the caller shall compute it."""
