"""A torch_dist checkpoint as Megatron reads it, written a tensor at a time by one process."""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from more_megatron.checkpoint_files import RELEASE, TRACKER
from more_megatron.hf.conversion.megatron_reader import layer_key
from more_megatron.hf.mapping import Entry, extra_states

# What `--save` writes of the layout of a checkpoint: megatron/training/checkpointing.py,
# `_build_sharded_state_dict_metadata`.
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_CHECKPOINT_VERSION = 3.0


def write_release(
    folder: Path,
    config: Mapping[str, Any],
    args: argparse.Namespace,
    parameters: Iterable[tuple[Entry, torch.dtype]],
    read: Callable[[Entry], torch.Tensor],
) -> None:
    """Write a checkpoint without optimizer, from which runs of any layout start at iteration 0.

    Args:
        folder: What `--load` will name; it exists and is empty.
        config: Content of `config.json`.
        args: Arguments of the run, stored in the checkpoint; `moe_layer_freq` says whether layers are stacked.
        parameters: Every parameter and its dtype.
        read: Returns a parameter in Megatron's layout and its dtype; called once for each, in their order.
    """
    stacked = isinstance(args.moe_layer_freq, int) and args.moe_layer_freq == 1
    layers = config["num_hidden_layers"] if stacked else None
    common = {
        "args": args,
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": dict(_CONTENT),
    }
    items: list[tuple[WriteItem, Any]] = [(_object("common_state", (0,), (1,)), common)]
    items += [(_object(*place), None) for place in _states(config, layers)]
    items += [(_tensor(entry, dtype, layers), entry) for entry, dtype in parameters]
    release = folder / RELEASE
    release.mkdir()
    # On a GPU's machine it would read ahead, the smallest first.
    writer = FileSystemWriter(release, per_thread_copy_ahead=0)
    # The metadata number the items, and refer to them by these numbers.
    plans, metadata = create_default_global_save_plan([SavePlan([item for item, _ in items])])
    (plan,) = writer.prepare_global_plan(plans)
    planner = _Planner({item.index: source for item, source in items}, read)
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    (release / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / TRACKER).write_text(RELEASE)


class _Planner(DefaultSavePlanner):
    """Reads each parameter when PyTorch's writer asks for it."""

    def __init__(self, sources: Mapping[MetadataIndex, Any], read: Callable[[Entry], torch.Tensor]) -> None:
        super().__init__()
        self._sources = sources
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        source = self._sources[write_item.index]
        if write_item.tensor_data is None:
            return self.transform_object(write_item, [source])
        return self._read(source).reshape(write_item.tensor_data.chunk.sizes)


def _object(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> WriteItem:
    """Return the item of an object, under the key that Megatron gives a `ShardedObject`."""
    name = f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"
    return WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)


def _tensor(entry: Entry, dtype: torch.dtype, layers: int | None) -> WriteItem:
    key, axes = _place(entry.key, entry.layer, layers)
    offsets = torch.Size([*(layer for layer, _ in axes), *(0 for _ in entry.shape)])
    chunk = torch.Size([*(1 for _ in axes), *entry.shape])
    size = torch.Size([*(number for _, number in axes), *entry.shape])
    data = TensorWriteData(ChunkStorageMetadata(offsets, chunk), TensorProperties(dtype=dtype), size)
    return WriteItem(index=MetadataIndex(key, offsets), type=WriteItemType.SHARD, tensor_data=data)


def _place(key: str, layer: int | None, layers: int | None) -> tuple[str, list[tuple[int, int]]]:
    """Return the key of what a layer has, and the axis in front where layers are stacked: its number among how many."""
    if layer is None or layers is None:
        return (key if layer is None else layer_key(key, layer)), []
    return key, [(layer, layers)]


def _states(config: Mapping[str, Any], layers: int | None) -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield key, offset and shape of the states that modules keep beside their parameters."""
    for name, layer, by_expert in extra_states(config):
        key, axes = _place(f"{name}._extra_state", layer, layers)
        experts = config["num_experts"]
        states = [[*axes, (expert, experts)] for expert in range(experts)] if by_expert else [axes or [(0, 1)]]
        for places in states:
            offset, shape = zip(*places, strict=True)
            yield key, offset, shape
