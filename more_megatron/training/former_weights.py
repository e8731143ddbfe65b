"""Starts a system from a checkpoint of another one, where they have weights in common under other names.

`--finetune` loads what both call the same. A system may say besides which of its parameters are found among those of
Megatron's experts (`System.former_keys`); what is left of its experts is drawn anew, and named.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.module import MegatronModule

from more_megatron.console import say
from more_megatron.systems import get_system, names
from more_megatron.systems.export import FEED_FORWARD
from more_megatron.training.stored_flags import checkpoint_source, stored_arguments


def ask_for_former_weights(args: argparse.Namespace, model: list[MegatronModule]) -> list[MegatronModule]:
    """Let a model that starts from a checkpoint of another system ask it for what it has of the model's weights.

    The stage's chunks, before they are wrapped, are returned as they are. What they ask for is another in their first
    call only, which is that of loading.
    """
    source = checkpoint_source(args) if args.finetune and args.ckpt_format == "torch_dist" else None
    saved = argparse.Namespace() if source is None else stored_arguments(source)
    former, system = getattr(saved, "more_variant", None), get_system(args.more_variant)
    if former not in names() or not system.former_keys:
        return model
    if get_system(former).expert_rows is FEED_FORWARD:
        biased = saved.add_bias_linear
        keys = {own: key for own, key in system.former_keys.items() if biased or not key.endswith(".bias")}
        anew = [row.megatron for row in system.expert_rows if row.megatron not in keys]
        # A gated expansion has two parts there, of which the last is taken: what is gated.
        request = functools.partial(_request, keys=keys, anew=anew, parts=2 if saved.swiglu else 1)
        for chunk in model:
            _replace_first_request(chunk, request)
        say(f"> {system.name} starts from {former}; drawn anew: {', '.join(anew)}")
    return model


def _replace_first_request(chunk: Any, request: Callable[[Any], Any]) -> None:
    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        del chunk.sharded_state_dict
        return dict_list_map_inplace(request, chunk.sharded_state_dict(*args, **kwargs))

    chunk.sharded_state_dict = sharded_state_dict


def _request(value: Any, keys: Mapping[str, str], anew: Sequence[str], parts: int) -> Any:
    """Return what a checkpoint with Megatron's experts is asked for in the place of what the model asks for."""
    if not isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject):
        return value
    if any(value.key.endswith(f".{name}") for name in anew):
        return LocalNonpersistentObject(value.data)
    own = next((name for name in keys if value.key.endswith(f".{name}")), None)
    if own is None:
        return value
    value = dataclasses.replace(value, key=value.key.removesuffix(own) + keys[own])
    if parts == 1 or "linear_fc1" not in value.key:
        return value
    # The output of the expansion is the last axis but one of a weight, and the last of a bias.
    return _last_part(value, -1 if own.endswith(".bias") else -2, parts)


def _last_part(value: ShardedTensor | ShardedTensorFactory, axis: int, parts: int) -> ShardedTensorFactory:
    """Return the request for the same slice of the last part of a tensor that is so many times as large.

    Megatron insists on all of a tensor being asked for: the other parts are read and dropped.
    """
    is_made = isinstance(value, ShardedTensorFactory)

    def build(key: str, data: torch.Tensor, replica_id: ReplicaId, flattened_range: Any = None) -> list[ShardedTensor]:
        whole = value.build_fn(key, data, replica_id, flattened_range) if is_made else value
        others = [dataclasses.replace(whole, data=torch.empty_like(whole.data)) for _ in range(parts - 1)]
        return [_part(shard, axis, number, parts) for number, shard in enumerate((*others, whole))]

    def merge(loaded: list[torch.Tensor]) -> torch.Tensor:
        return value.merge_fn(loaded[-1]) if is_made else loaded[-1]

    return ShardedTensorFactory(value.key, value.data, build, merge, value.replica_id)


def _part(value: ShardedTensor, axis: int, number: int, parts: int) -> ShardedTensor:
    shape, offset, fragments = (list(x) for x in (value.global_shape, value.global_offset, value.axis_fragmentations))
    offset[axis] += number * shape[axis]
    shape[axis] *= parts
    fragments[axis] *= parts
    places = {"global_shape": tuple(shape), "global_offset": tuple(offset), "axis_fragmentations": tuple(fragments)}
    return dataclasses.replace(value, **places)
