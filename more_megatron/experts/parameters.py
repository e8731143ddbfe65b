"""Weights of several experts in one tensor, and how such tensors are written to checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError

__all__ = ["Placement", "draw_parameter", "grouped_parameter", "sharded_parameters"]


@dataclass(frozen=True)
class Placement:
    """Which part of the groups' weights this rank holds.

    A group is an expert, or the one block that experts share.

    Attributes:
        groups: Global numbers of the groups on this rank, consecutive.
        num_groups: Number of groups in the layer.
        split_group: Process group over whose ranks the weights of one group are split.
        replica_rank: Rank among those that hold the same part.
    """

    groups: Sequence[int]
    num_groups: int
    split_group: torch.distributed.ProcessGroup | None
    replica_rank: int

    @property
    def split_size(self) -> int:
        """Number of parts that the weights of one group are split into."""
        return get_pg_size(self.split_group)

    @property
    def split_rank(self) -> int:
        """Which of these parts is here."""
        return get_pg_rank(self.split_group)


# Attribute of a parameter: the dimension of it that is split over ranks, or None.
_SPLIT_DIM = "split_dim"


def grouped_parameter(
    config: MoREConfig, placement: Placement, shape: tuple[int, ...], split_dim: int | None = None
) -> torch.nn.Parameter:
    """Return the weights of all groups on this rank as one parameter, not yet drawn.

    Args:
        config: Model configuration.
        placement: Which part of them is here.
        shape: Shape of a group's whole weight.
        split_dim: Dimension of a group's weight that is split over ranks; None if every rank holds all of it.

    Returns:
        Parameter [groups, ...]. A weight of one dimension is laid out flat, [groups * size]: Megatron decays no
        parameter of one dimension.

    Raises:
        MoREError: If the split does not come out even.
    """
    local = list(shape)
    if split_dim is not None:
        if shape[split_dim] % placement.split_size != 0:
            raise MoREError(
                f"a weight of shape {shape} cannot be split over {placement.split_size} ranks: "
                "choose an --expert-tensor-parallel-size that divides heads, query groups and MLP width"
            )
        local[split_dim] //= placement.split_size
    size = [len(placement.groups) * local[0]] if len(shape) == 1 else [len(placement.groups), *local]
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
    split = split_dim + 1 if split_dim is not None and placement.split_size > 1 else None
    set_tensor_model_parallel_attributes(parameter, split is not None, -1 if split is None else split, 1)
    setattr(parameter, _SPLIT_DIM, split)
    return parameter


@torch.no_grad()
def draw_parameter(parameter: torch.nn.Parameter, placement: Placement, draw: Callable[[int], torch.Tensor]) -> None:
    """Fill a parameter of `grouped_parameter` with initial weights.

    Args:
        parameter: To be filled.
        placement: Which part of the weights it holds.
        draw: Returns the whole weight of a group, given its global number.
    """
    local = parameter.view(len(placement.groups), -1) if parameter.dim() == 1 else parameter
    split = getattr(parameter, _SPLIT_DIM)
    for target, group in zip(local, placement.groups, strict=True):
        weight = draw(group)
        if split is not None:
            weight = weight.chunk(placement.split_size, dim=split - 1)[placement.split_rank]
        target.copy_(weight)


def sharded_parameters(
    module: torch.nn.Module,
    placement: Placement,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, ShardedTensor]:
    """Return a module's own grouped parameters as slices of global tensors, one key each.

    Args:
        module: Holds parameters made by `grouped_parameter`.
        placement: Which part of them is here.
        prefix: Prefix of the keys.
        sharded_offsets: Offsets of the layer, as Megatron passes them.
        metadata: As Megatron passes it.
    """
    ensure_metadata_has_dp_cp_group(metadata)
    axes = len(sharded_offsets)
    chunks = placement.num_groups // len(placement.groups)
    sharded = {}
    for name, parameter in module.named_parameters(recurse=False):
        offsets = [*sharded_offsets, (axes, placement.groups[0] // len(placement.groups), chunks)]
        split = getattr(parameter, _SPLIT_DIM)
        if split is not None:
            offsets.append((axes + split, placement.split_rank, placement.split_size))
        copies = 0 if split is not None else placement.split_rank
        sharded[prefix + name] = ShardedTensor.from_rank_offsets(
            prefix + name,
            parameter,
            *offsets,
            replica_id=(0, copies, placement.replica_rank),
            prepend_axis_num=axes,
        )
    return sharded
