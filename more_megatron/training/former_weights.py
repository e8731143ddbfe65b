"""Starts a system from a checkpoint of another one, where they have weights in common under other names.

`--finetune` loads what both call the same. A system may say besides which of its parameters are found among those of
Megatron's experts (`System.former_keys`); what is left of its experts is drawn anew, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
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

from more_megatron.systems import System, get_system, names
from more_megatron.systems.export import FEED_FORWARD

__all__ = ["former_weights"]


@contextlib.contextmanager
def former_weights(args: argparse.Namespace, saved: argparse.Namespace | None, model: list[Any]) -> Iterator[None]:
    """Let the model ask a checkpoint of another system for what it has of its weights.

    Args:
        args: Arguments of the run, which has `--finetune`.
        saved: Those of the run that saved the checkpoint; None if there is none.
        model: The stage's chunks, as the trainer has wrapped them.
    """
    system, former = get_system(args.more_variant), getattr(saved, "more_variant", None)
    is_served = former in names() and get_system(former).expert_rows is FEED_FORWARD
    if saved is None or former is None or not (is_served and system.former_keys):
        yield
        return
    source = _Source(system, former, halves=2 if saved.swiglu else 1, has_biases=saved.add_bias_linear)
    chunks = [_innermost(chunk) for chunk in model]
    for chunk in chunks:
        chunk.sharded_state_dict = source.of_former(chunk.sharded_state_dict)
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.sharded_state_dict
    if args.rank == 0:
        print(f"> {system.name} starts from {former}; drawn anew: {', '.join(source.anew)}", flush=True)


def _innermost(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module


class _Source:
    """Turns what a model asks a checkpoint for into what a checkpoint with Megatron's experts has.

    Args:
        system: The model's system.
        former: Name of the checkpoint's system.
        halves: Number of parts of its expansion, of which the last is taken: of a gated one what the gate lets through.
        has_biases: Whether its experts have biases.
    """

    def __init__(self, system: System, former: str, halves: int, has_biases: bool) -> None:
        self._halves = halves
        self._keys = {own: key for own, key in system.former_keys.items() if has_biases or not key.endswith(".bias")}
        self.anew = [row.megatron for row in system.expert_rows if row.megatron not in self._keys]

    def of_former(self, sharded_state_dict: Any) -> Any:
        """Return the method of a model that says what it asks for, with other keys."""

        def asks_for(*args: Any, **kwargs: Any) -> Any:
            state = sharded_state_dict(*args, **kwargs)
            return dict_list_map_inplace(self._replace, state)

        return asks_for

    def _replace(self, value: Any) -> Any:
        if not isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject):
            return value
        if any(value.key.endswith(f".{name}") for name in self.anew):
            return LocalNonpersistentObject(value.data)
        own = next((name for name in self._keys if value.key.endswith(f".{name}")), None)
        if own is None:
            return value
        value = dataclasses.replace(value, key=value.key.removesuffix(own) + self._keys[own])
        if self._halves == 1 or "linear_fc1" not in value.key:
            return value
        # The output of the expansion is the last axis but one of a weight, and the last of a bias.
        return _last_part(value, -1 if own.endswith(".bias") else -2, self._halves)


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
