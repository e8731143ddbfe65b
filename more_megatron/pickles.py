"""Reading the pickles of a checkpoint without running what they name.

Whatever a pickle names is imported and called. Here only types that hold data are built. What else a checkpoint's index
names is refused; what else its arguments hold, such as members of Megatron's enumerations, whose modules take seconds
to import, becomes an `Opaque`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import pickle
import re
import types
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from more_megatron.errors import MoREError

__all__ = ["Opaque", "load", "load_strictly", "read_metadata"]

# Beside what PyTorch takes for safe. Pairs, so that leaving `safe_globals` forgets nothing that Megatron has declared.
_DATA: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
]
# What the index of a checkpoint is made of: PyTorch's description of the tensors, and of the plan that wrote them.
_INDEX_TYPES: dict[str, tuple[str, ...]] = {
    "collections": ("OrderedDict", "defaultdict"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.serialization": ("_get_layout",),
}


class Opaque:
    """Stands for an object of a type that is not needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if name not in _INDEX_TYPES.get(module, ()):
            raise MoREError(
                f"its .metadata names {module}.{name}, which is not known to hold data only and could run code"
            )
        return getattr(importlib.import_module(module), name)


def load(content: bytes) -> Any:
    """Return the object that `torch.save` wrote, given the whole file, with an `Opaque` for each that is not known."""
    with torch.serialization.safe_globals(_DATA):
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        with torch.serialization.safe_globals([(Opaque, name) for name in unknown]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_strictly(content: Any) -> Any:
    """Return the object that `torch.save` wrote into an open file, with its types, if these hold nothing but data.

    Raises:
        MoREError: If it names anything else; nothing of it is run.
    """
    try:
        return torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise
        raise MoREError(f"it names {named[1]}, which is not known to hold data only and could run code") from error


def read_metadata(checkpoint: Path, name: str = ".metadata") -> Metadata:
    """Return the index in the folder of a checkpoint.

    Raises:
        MoREError: If it names what could run code, or a file outside of the checkpoint's folder, or is no index.
    """
    with open(checkpoint / name, "rb") as file:
        metadata: Metadata = _IndexUnpickler(file).load()
    parts = (metadata.storage_data, metadata.state_dict_metadata)
    if not all(isinstance(part, dict) for part in parts):
        raise MoREError("its .metadata does not say what is in it")
    inside = checkpoint.resolve()
    for file_name in {info.relative_path for info in metadata.storage_data.values()}:
        if (checkpoint / file_name).resolve().parent != inside:
            raise MoREError(f"its .metadata names the file {file_name}, which is not in its folder")
    return metadata
