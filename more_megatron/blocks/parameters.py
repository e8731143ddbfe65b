"""Weights of several experts: how they are created, drawn, and written to checkpoints.

In a checkpoint a weight of all experts is one tensor with an axis for them. On a rank it is one parameter or several,
as the backend wants it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.blocks.backends import Weights, backend_of
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.initialization import parameter_device

__all__ = [
    "Placement",
    "draw_parameter",
    "draw_parameters",
    "grouped_bias",
    "grouped_linear_weights",
    "grouped_norm_weight",
    "grouped_parameter",
    "linear_columns",
    "local_groups",
    "sharded_parameters",
]


@dataclass(frozen=True)
class Placement:
    """Which part of the groups' weights this rank holds.

    A group is an expert, or the one block that experts share.
    """

    groups: Sequence[int]  # global numbers of the groups on this rank, consecutive
    num_groups: int  # number of groups in the layer
    # Process group over whose ranks the weights of one group are split
    split_group: torch.distributed.ProcessGroup | None
    replica_rank: int  # rank among those that hold the same part

    @property
    def split_size(self) -> int:
        """Number of parts that the weights of one group are split into."""
        return get_pg_size(self.split_group)

    @property
    def split_rank(self) -> int:
        """Which of these parts is here."""
        return get_pg_rank(self.split_group)


# Attribute of a parameter: what it holds.
_CONTENT = "content_of_groups"


@dataclass(frozen=True)
class _Content:
    """What a parameter holds of a weight that each group has."""

    shape: tuple[int, ...]  # shape of what it holds of one group, as in checkpoints
    split_dim: int | None  # dimension of a group's weight that is split over ranks; None if it is not
    group: int | None = None  # number of the group among those of the rank; None if it holds all, stacked
    column: int = 0  # which part of the last dimension it holds
    columns: int = 1  # number of these parts
    tail: str = ""  # what follows the name of the weight in the parameter's name
    # Whether checkpoints have an axis for the groups that a parameter of one dimension has not
    has_group_axis: bool = False

    def of_whole(self, weight: torch.Tensor, placement: Placement) -> torch.Tensor:
        """Return what is here of a group's whole weight."""
        if self.split_dim is not None:
            weight = weight.chunk(placement.split_size, dim=self.split_dim)[placement.split_rank]
        return weight.chunk(self.columns, dim=-1)[self.column]


def grouped_parameter(
    config: MoREConfig, placement: Placement, shape: tuple[int, ...], split_dim: int | None = None
) -> torch.nn.Parameter:
    """Return the weights of all groups on this rank as one parameter, [groups, ...], not yet drawn.

    A weight of one dimension is laid out flat, [groups * size]: Megatron decays no parameter of one dimension.

    Args:
        shape: Shape of a group's whole weight.
        split_dim: Dimension of a group's weight that is split over ranks; None if every rank holds all of it.

    Raises:
        MoREError: If the split does not come out even.
    """
    local, split_dim = _local_shape(placement, shape, split_dim)
    groups = len(placement.groups)
    return _new(config, (groups * local[0],) if len(local) == 1 else (groups, *local), _Content(local, split_dim))


def grouped_bias(
    config: MoREConfig, placement: Placement, shape: tuple[int, ...], split_dim: int | None = None
) -> torch.nn.Parameter:
    """Return the biases of all groups on this rank as one parameter; otherwise as `grouped_parameter`.

    It is laid out flat, for the same reason. In a checkpoint the biases are one tensor with an axis for the groups, as
    weights are: [groups, ...].
    """
    local, split_dim = _local_shape(placement, shape, split_dim)
    size = len(placement.groups) * math.prod(local)
    return _new(config, (size,), _Content(local, split_dim, has_group_axis=True))


def grouped_linear_weights(
    config: MoREConfig, placement: Placement, shape: tuple[int, ...], split_dim: int | None = None, columns: int = 1
) -> Weights:
    """Return the weights of a linear map for each group on this rank, as the backend keeps them.

    Arguments are those of `grouped_parameter`, the last dimension of the shape being the input, and `columns`, the
    number of equal parts of the input that are multiplied separately.
    """
    local, split_dim = _local_shape(placement, shape, split_dim)
    backend = backend_of(config)
    weights = backend.linear_weights(config, len(placement.groups), local, columns)
    names = _names(weights)
    for piece in backend.pieces(weights):
        held = (*local[:-1], local[-1] // piece.columns)
        part = (piece.group, piece.column, piece.columns)
        _mark(piece.parameter, _Content(held, split_dim, *part, tail=names[piece.parameter]))
    return weights


def grouped_norm_weight(config: MoREConfig, placement: Placement) -> Weights:
    """Return the weights of an RMSNorm for each group, not yet drawn: a norm of the backend's if it has one."""
    shape = (config.hidden_size,)
    norm = backend_of(config).row_norm(config) if len(placement.groups) == 1 else None
    if norm is None:
        return grouped_parameter(config, placement, shape)
    for parameter, tail in _names(norm).items():
        _mark(parameter, _Content(shape, None, tail=tail))
    return norm


def _new(config: MoREConfig, size: tuple[int, ...], content: _Content) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=parameter_device(config)))
    _mark(parameter, content)
    return parameter


def _local_shape(
    placement: Placement, shape: tuple[int, ...], split_dim: int | None
) -> tuple[tuple[int, ...], int | None]:
    """Return the shape of what is here of one group's weight, and the dimension that is really split."""
    if split_dim is None or placement.split_size == 1:
        return shape, None
    if shape[split_dim] % placement.split_size != 0:
        raise MoREError(
            f"a weight of shape {shape} cannot be split over {placement.split_size} ranks: "
            "choose an --expert-tensor-parallel-size that divides heads, query groups and MLP width"
        )
    local = list(shape)
    local[split_dim] //= placement.split_size
    return tuple(local), split_dim


def _names(weights: Weights) -> dict[torch.nn.Parameter, str]:
    """Return what follows the name of the weight in the names of its parameters."""
    if isinstance(weights, torch.nn.Parameter):
        return {weights: ""}
    return {parameter: f".{name}" for name, parameter in weights.named_parameters()}


def _mark(parameter: torch.nn.Parameter, content: _Content) -> None:
    """Note on a parameter what it holds, and mark it as Megatron marks weights that are split over ranks."""
    setattr(parameter, _CONTENT, content)
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    dim = -1
    if content.split_dim is not None:
        dim = 0 if content.has_group_axis else content.split_dim + (content.group is None)
    set_tensor_model_parallel_attributes(parameter, dim >= 0, dim, 1)


@torch.no_grad()
def draw_parameter(weights: Weights, placement: Placement, draw: Callable[[int], torch.Tensor]) -> None:
    """Fill weights from the functions above; `draw` returns the whole weight of a group, given its global number."""
    for parameter in _names(weights):
        content: _Content = getattr(parameter, _CONTENT)
        if content.group is None:
            targets = list(zip(parameter.view(len(placement.groups), -1), placement.groups, strict=True))
        else:
            targets = [(parameter, placement.groups[content.group])]
        for target, group in targets:
            target.copy_(content.of_whole(draw(group), placement).reshape(target.shape))


def draw_parameters(
    module: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    placement: Placement,
    draw: Callable[[str, tuple[int, ...], int], torch.Tensor],
) -> None:
    """Fill several weights of a module, given the shape of a group's whole weight by their names.

    `draw` returns the whole weight of a group, given the weight's name, its shape and the group's global number.
    """
    for name, shape in shapes.items():
        draw_parameter(getattr(module, name), placement, functools.partial(draw, name, shape))


def local_groups(parameter: torch.nn.Parameter, number: int) -> range:
    """Return which of the rank's `number` groups a parameter holds weights of, one after the other; empty if none."""
    content: _Content | None = getattr(parameter, _CONTENT, None)
    if content is None:
        return range(0)
    return range(number) if content.group is None else range(content.group, content.group + 1)


def linear_columns(parameter: torch.nn.Parameter, number: int) -> dict[int, torch.Tensor]:
    """Return which of the `number` equal parts of its input dimension a linear map's parameter holds, by number."""
    content: _Content | None = getattr(parameter, _CONTENT, None)
    if content is not None and content.columns > 1:
        return {content.column: parameter}
    return dict(enumerate(parameter.chunk(number, dim=-1)))


def sharded_parameters(
    module: torch.nn.Module,
    placement: Placement,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Return a module's weights as slices of global tensors, one key for each weight whatever the backend.

    The module holds nothing but weights from the functions above; the last three arguments are as Megatron passes them.
    """
    ensure_metadata_has_dp_cp_group(metadata)
    sharded = {}
    for name, parameter in module.named_parameters():
        content: _Content = getattr(parameter, _CONTENT)
        key = prefix + name.removesuffix(content.tail)
        sharded[prefix + name] = _slice(key, parameter, content, placement, sharded_offsets)
    return sharded


def _slice(
    key: str,
    parameter: torch.nn.Parameter,
    content: _Content,
    placement: Placement,
    layer_offsets: tuple[tuple[int, int, int], ...],
) -> ShardedTensor | ShardedTensorFactory:
    axes, groups = len(layer_offsets), placement.groups
    copies = 0 if content.split_dim is not None else placement.split_rank
    replica = (0, copies, placement.replica_rank)
    if content.group is None:
        offsets = [*layer_offsets, (axes, groups[0] // len(groups), placement.num_groups // len(groups))]
        shape, prepended = parameter.shape, axes
        if content.has_group_axis:
            shape = torch.Size((len(groups), *content.shape))
    else:
        offsets = [*layer_offsets, (axes, groups[content.group], placement.num_groups)]
        shape, prepended = torch.Size(content.shape), axes + 1
    if content.split_dim is not None:
        offsets.append((axes + 1 + content.split_dim, placement.split_rank, placement.split_size))
    if content.columns > 1:
        offsets.append((axes + len(content.shape), content.column, content.columns))

    def build(key: str, tensor: torch.Tensor, replica_id: ReplicaId, *_: Any) -> ShardedTensor:
        # Not a view where it can be the parameter itself, by which the optimizer finds its state's place.
        tensor = tensor if tensor.shape == shape else tensor.view(shape)
        return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=prepended)

    if parameter.shape == shape:
        return build(key, parameter, replica)
    return ShardedTensorFactory(key, parameter, build, lambda loaded: loaded.view(parameter.shape), replica)
