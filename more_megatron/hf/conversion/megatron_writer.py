"""A torch_dist checkpoint as Megatron reads it, written a tensor at a time by one process."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from more_megatron.hf.conversion.megatron_reader import layer_key
from more_megatron.hf.mapping import Entry, extra_states

__all__ = ["write_release"]

_DATA_FILE = "__0_0.distcp"
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
    sources: list[tuple[WriteItem, Entry | Any]] = [(_object("common_state", (0,), (1,)), common)]
    sources += [(_object(*place), None) for place in _states(config, layers)]
    sources += [(_tensor(entry, dtype, layers), entry) for entry, dtype in parameters]
    release = folder / "release"
    release.mkdir()
    # The metadata number the items, and refer to them by these numbers.
    (plan,), metadata = create_default_global_save_plan([SavePlan([item for item, _ in sources])])
    results = _write(release / _DATA_FILE, plan.items, [source for _, source in sources], read)
    FileSystemWriter(release).finish(metadata, [results])
    (release / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")


def _write(
    path: Path, items: Iterable[WriteItem], sources: Iterable[Any], read: Callable[[Entry], torch.Tensor]
) -> list[WriteResult]:
    results = []
    with open(path, "wb") as stream:
        for item, source in zip(items, sources, strict=True):
            start = stream.tell()
            if isinstance(source, Entry) and item.tensor_data is not None:
                torch.save(read(source).reshape(item.tensor_data.chunk.sizes).clone(), stream)
            else:
                content = io.BytesIO()
                torch.save([source], content)
                stream.write(content.getbuffer())
            info = _StorageInfo(path.name, start, stream.tell() - start)
            results.append(WriteResult(index=item.index, size_in_bytes=info.length, storage_data=info))
    return results


def _object(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> WriteItem:
    """Return the item of an object, under the key that Megatron gives a `ShardedObject`."""
    name = f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"
    return WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)


def _tensor(entry: Entry, dtype: torch.dtype, layers: int | None) -> WriteItem:
    key, size = entry.key, entry.shape
    offsets, chunk = (0,) * len(size), size
    if entry.layer is not None and layers is None:
        key = layer_key(key, entry.layer)
    elif entry.layer is not None and layers is not None:
        offsets, chunk, size = (entry.layer, *offsets), (1, *size), (layers, *size)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk)),
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(size),
    )
    return WriteItem(index=MetadataIndex(key, torch.Size(offsets)), type=WriteItemType.SHARD, tensor_data=data)


def _states(config: Mapping[str, Any], layers: int | None) -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield key, offset and shape of the states that modules keep beside their parameters."""
    for name, layer, by_expert in extra_states(config):
        key, axes = f"{name}._extra_state", []
        if layer is not None and layers is None:
            key = layer_key(key, layer)
        elif layer is not None:
            axes = [(layer, layers)]
        experts = config["num_experts"]
        for places in [[*axes, (expert, experts)] for expert in range(experts)] if by_expert else [axes or [(0, 1)]]:
            offset, shape = zip(*places, strict=True)
            yield key, offset, shape
