"""Reading the pickles of a checkpoint without running what they name.

Whatever a pickle names is imported and called. Here only types that hold data are built. What else a checkpoint's index
names is refused; what else its arguments hold, such as members of Megatron's enumerations, whose modules take seconds
to import, becomes an `Opaque`.
"""

from __future__ import annotations

import argparse
import collections
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

_TYPES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch", "Size"): torch.Size,
}

# What the index of a checkpoint is made of: PyTorch's description of the tensors, and of the plan that wrote them.
_INDEX_TYPES: dict[str, tuple[str, ...]] = {
    "collections": ("OrderedDict", "defaultdict"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
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

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if module == "torch" and name.endswith("Storage"):
            return found
        return _TYPES.get((module, name), Opaque)


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


class _Pickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        """Unpickle the parts that files from before PyTorch 1.6 begin with."""
        return _Unpickler(file, **kwargs).load()


def load(content: bytes) -> Any:
    """Return the object that `torch.save` wrote, given the whole file.

    Raises:
        MoREError: If it is a program of TorchScript, which no pickle module is asked about.
    """
    if b"constants.pkl" in content:
        raise MoREError("it is a TorchScript archive, which could run code")
    return torch.load(io.BytesIO(content), map_location="cpu", pickle_module=_Pickle, weights_only=False)


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
