"""Weights of several experts: how they are created, drawn, and written to checkpoints.

In a checkpoint a weight of all experts is one tensor with an axis for them. On a rank it is one parameter or several,
as the backend wants it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from more_megatron.blocks.backends import Weights, backend_of
from more_megatron.blocks.placement import Placement
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.initialization import BlockInitializer, Draw, parameter_device


@dataclass(frozen=True)
class Weight:
    """A weight that each group has."""

    shape: tuple[int, ...]  # shape of a group's whole weight; the last dimension of a linear map is the input
    name: str  # by which a group's is drawn: unique within the layer, with {} for the number of the group
    draw: Draw  # draws a group's whole weight
    split_dim: int | None = None  # dimension that is split over ranks; None if every rank holds all of it


# Attribute of a parameter: what it holds.
_CONTENT = "content_of_groups"


@dataclass(frozen=True)
class _Content:
    """What a parameter holds of a weight that each group has."""

    weight: Weight
    shape: tuple[int, ...]  # shape of what it holds of one group, as in checkpoints
    split_dim: int | None  # dimension of a group's weight that is split over ranks; None if it is not
    group: int | None = None  # number of the group among those of the rank; None if it holds all, stacked
    column: int = 0  # which part of the last dimension it holds
    columns: int = 1  # number of these parts
    tail: str = ""  # what follows the name of the weight in the parameter's name
    # Whether checkpoints have an axis for the groups that a parameter of one dimension has not
    has_group_axis: bool = False


class GroupedModule(MegatronModule):
    """A module that holds nothing but weights of groups: creates them, draws them, writes them to checkpoints.

    Parts of it may be such modules too; it draws and writes theirs with its own.
    """

    config: MoREConfig
    layer_number = 0

    def __init__(self, config: MoREConfig, placement: Placement) -> None:
        super().__init__(config=config)
        self.placement, self.backend = placement, backend_of(config)

    def stacked_weight(self, weight: Weight) -> torch.nn.Parameter:
        """Return the weights of all groups on this rank as one parameter, [groups, ...], not yet drawn.

        A weight of one dimension is laid out flat, [groups * size]: Megatron decays no parameter of one dimension.

        Raises:
            MoREError: If the split does not come out even.
        """
        content, groups = self._content(weight), len(self.placement.groups)
        local = content.shape
        return self._new((groups * local[0],) if len(local) == 1 else (groups, *local), content)

    def stacked_bias(self, weight: Weight) -> torch.nn.Parameter:
        """Return the biases of all groups on this rank as one parameter; otherwise as `stacked_weight`.

        It is laid out flat, for the same reason. In a checkpoint the biases are one tensor with an axis for the groups,
        as weights are: [groups, ...].
        """
        content = self._content(weight, has_group_axis=True)
        return self._new((len(self.placement.groups) * math.prod(content.shape),), content)

    def linear_weights(self, weight: Weight, columns: int = 1) -> Weights:
        """Return the weights of a linear map for each group on this rank, not yet drawn, as the backend keeps them.

        `columns` is the number of equal parts of the input that are multiplied separately.
        """
        content, groups = self._content(weight), len(self.placement.groups)
        module = self.backend.linear_module(self.config, groups, content.shape, columns)
        if module is None:
            return self.stacked_weight(weight)
        held = (*content.shape[:-1], content.shape[-1] // columns)
        for index, (name, parameter) in enumerate(module.named_parameters()):
            column, group = divmod(index, groups)
            part = dataclasses.replace(content, shape=held, group=group, column=column, columns=columns)
            _mark(parameter, dataclasses.replace(part, tail=f".{name}"))
        return module

    def norm_weights(self) -> Weights:
        """Return the weights of an RMSNorm for each group, not yet drawn: a norm of the backend's if it has one."""
        weight = Weight((self.config.hidden_size,), "norm", BlockInitializer.ones)
        norm = self.backend.row_norm(self.config) if len(self.placement.groups) == 1 else None
        if norm is None:
            return self.stacked_weight(weight)
        for name, parameter in norm.named_parameters():
            _mark(parameter, self._content(weight, tail=f".{name}"))
        return norm

    def _content(self, weight: Weight, **more: Any) -> _Content:
        parts, local, split_dim = self.placement.split_size, list(weight.shape), weight.split_dim
        if split_dim is None or parts == 1:
            return _Content(weight, weight.shape, None, **more)
        if local[split_dim] % parts != 0:
            raise MoREError(
                f"a weight of shape {weight.shape} cannot be split over {parts} ranks: "
                "choose an --expert-tensor-parallel-size that divides heads, query groups and MLP width"
            )
        local[split_dim] //= parts
        return _Content(weight, tuple(local), split_dim, **more)

    def _new(self, size: tuple[int, ...], content: _Content) -> torch.nn.Parameter:
        device, dtype = parameter_device(self.config), self.config.params_dtype
        parameter = torch.nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        _mark(parameter, content)
        return parameter

    def initialize(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the initial weights, which depend on it."""
        self.layer_number = layer_number
        if self.config.perform_initialization:
            self._draw(BlockInitializer(self.config, layer_number))

    @torch.no_grad()
    def _draw(self, initializer: BlockInitializer) -> None:
        groups, parts = self.placement.groups, self.placement.split_size
        for parameter in self.parameters():
            content: _Content = getattr(parameter, _CONTENT)
            weight = content.weight
            if content.group is None:
                targets = list(zip(parameter.view(len(groups), -1), groups, strict=True))
            else:
                targets = [(parameter, groups[content.group])]
            for target, group in targets:
                values = weight.draw(initializer, weight.shape, weight.name.format(group))
                if content.split_dim is not None:
                    values = values.chunk(parts, dim=content.split_dim)[self.placement.split_rank]
                target.copy_(values.chunk(content.columns, dim=-1)[content.column].reshape(target.shape))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Return the weights as slices of global tensors, one key for each weight whatever the backend."""
        ensure_metadata_has_dp_cp_group(metadata)
        sharded = {}
        for name, parameter in self.named_parameters():
            content: _Content = getattr(parameter, _CONTENT)
            key = prefix + name.removesuffix(content.tail)
            sharded[prefix + name] = _slice(key, parameter, content, self.placement, sharded_offsets)
        return sharded


def _mark(parameter: torch.nn.Parameter, content: _Content) -> None:
    """Note on a parameter what it holds, and mark it as Megatron marks weights that are split over ranks."""
    setattr(parameter, _CONTENT, content)
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    dim = -1
    if content.has_group_axis and content.split_dim is not None:
        dim = 0  # laid out flat
    elif content.split_dim is not None:
        dim = content.split_dim + (1 if content.group is None else 0)  # behind the axis of the groups, if there is one
    set_tensor_model_parallel_attributes(parameter, dim >= 0, dim, 1)


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
