"""A torch_dist checkpoint, read a tensor at a time in one process, whatever layout wrote it."""

import argparse
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from more_megatron.checkpoint_files import check_files, checkpoint_to_load, newest_complete_iteration
from more_megatron.errors import MoREError
from more_megatron.hf.conversion.parameters import check_shapes
from more_megatron.hf.mapping import LAYERS, Entry
from more_megatron.pickles import common_state, model_tensors, read_metadata, read_piece


class MegatronCheckpoint:
    """One checkpoint in a folder that a run saved to.

    Args:
        folder: The folder that `--save` named.
        step: Iteration of the checkpoint, None for the newest.

    Raises:
        MoREError: If there is no checkpoint, or it is incomplete or damaged.

    Attributes:
        path: Folder of the checkpoint.
        args: Arguments of the run.
        iteration: Iteration at which it was saved.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        self.path = _find(folder, step)
        metadata = read_metadata(self.path)
        self._pieces = metadata.storage_data
        self._tensors = model_tensors(metadata)
        common = common_state(self.path)
        self.args: argparse.Namespace = common.get("args", argparse.Namespace())
        self.iteration: int = common.get("iteration", 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the model, layers stacked where they are."""
        return {key: tuple(info.size) for key, info in self._tensors.items()}

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a parameter."""
        return self._tensors[self._place(entry)[0]].properties.dtype

    def check(self, entries: Iterable[Entry], num_layers: int) -> None:
        """Check that the checkpoint holds exactly these parameters, in these shapes.

        Raises:
            MoREError: If a parameter is missing, unknown, of another shape or no floating point.
        """
        places = ((entry.shape, *self._place(entry)) for entry in entries)
        expected = [(key, shape if layer is None else (num_layers, *shape)) for shape, key, layer in places]
        check_shapes(f"checkpoint {self.path}", self.shapes(), expected)
        for key, info in self._tensors.items():
            if not info.properties.dtype.is_floating_point:
                raise MoREError(f"checkpoint {self.path} holds {key} in {info.properties.dtype}")

    def read(self, entry: Entry) -> torch.Tensor:
        """Return a parameter, in Megatron's layout.

        Raises:
            MoREError: If its data are damaged or incomplete.
        """
        key, layer = self._place(entry)
        info = self._tensors[key]
        offsets, sizes = (0,) * len(entry.shape), entry.shape
        if layer is not None:
            offsets, sizes = (layer, *offsets), (1, *sizes)
        target = torch.empty(sizes, dtype=info.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, info, [chunk])
        if sum(prod(item.lengths) for item in items) != target.numel():
            raise MoREError(f"checkpoint {self.path} is damaged: a part of {key} is missing")
        try:
            for item in items:
                piece = torch.load(read_piece(self.path, self._pieces[item.storage_index]), weights_only=True)
                part = narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)
                narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(part)
        except Exception as error:  # whatever damaged content raises
            raise MoREError(f"checkpoint {self.path} is damaged: {key} cannot be read") from error
        return target.view(entry.shape)

    def _place(self, entry: Entry) -> tuple[str, int | None]:
        """Return the key that holds a parameter, and the layer in it where layers are stacked."""
        if entry.layer is None or entry.key in self._tensors:
            return entry.key, entry.layer
        return layer_key(entry.key, entry.layer), None


def layer_key(key: str, layer: int) -> str:
    """Return the key of a parameter where layers are not stacked."""
    return f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"


def _find(folder: Path, step: int | None) -> Path:
    if not folder.is_dir():
        raise MoREError(f"--load {folder} is not a folder: name the one that the run saved to")
    path = checkpoint_to_load(folder, step)
    if path is None:
        newest = newest_complete_iteration(folder)
        remedy = "name another folder" if newest is None else f"--ckpt-step {newest} takes the newest complete one"
        raise MoREError(f"--load {folder} does not say which checkpoint is the newest: {remedy}")
    check_files(path)
    return path
