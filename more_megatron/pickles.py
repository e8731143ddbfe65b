"""Reading a checkpoint without running what its pickles name, and without believing what is damaged.

Whatever a pickle names is imported and called. Here only types that hold data are built. What else a checkpoint's index
names is refused; what else its arguments hold, such as members of Megatron's enumerations, whose modules take seconds
to import, becomes an `Opaque`.
"""

import argparse
import importlib
import io
import pickle
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from more_megatron.errors import MoREError, last_line

_OF_THE_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

# What a checkpoint holds beside tensors: an object among them, or, as Megatron used to write it, a file.
_COMMON, _LEGACY_COMMON = "common_state/shard_0_1", "common.pt"

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


def load(content: io.BytesIO) -> Any:
    """Return the object that `torch.save` wrote into a file, with an `Opaque` for each that is not known."""
    with torch.serialization.safe_globals(_DATA):
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(content)
        content.seek(0)
        with torch.serialization.safe_globals([(Opaque, name) for name in unknown]):
            return torch.load(content, map_location="cpu", weights_only=True)


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


def read_metadata(checkpoint: Path) -> Metadata:
    """Return the index in the folder of a checkpoint.

    Raises:
        MoREError: If it names what could run code, or a file outside of the checkpoint's folder, or no tensors.
    """
    with open(checkpoint / ".metadata", "rb") as file:
        metadata: Metadata = _IndexUnpickler(file).load()
    if not isinstance(metadata.state_dict_metadata, dict):
        raise MoREError("its .metadata does not say what is in it")
    inside = checkpoint.resolve()
    for file_name in {info.relative_path for info in metadata.storage_data.values()}:
        if (checkpoint / file_name).resolve().parent != inside:
            raise MoREError(f"its .metadata names the file {file_name}, which is not in its folder")
    return metadata


def model_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return what the index of a checkpoint says of each tensor of the model, by key; the optimizer's are not these."""
    return {
        key: info
        for key, info in metadata.state_dict_metadata.items()
        if isinstance(info, TensorStorageMetadata) and not _OF_THE_OPTIMIZER.match(key)
    }


def common_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors: `args`, those of the run, if it has any, and its `iteration`.

    Types that are not known to hold nothing but data are `Opaque`.

    Raises:
        MoREError: If it is damaged.
    """
    legacy = checkpoint / _LEGACY_COMMON
    try:
        if legacy.is_file():
            found = load(io.BytesIO(legacy.read_bytes()))
        else:
            pieces = read_metadata(checkpoint).storage_data
            [found] = load(read_piece(checkpoint, pieces[next(index for index in pieces if index.fqn == _COMMON)]))
        if not isinstance(found, dict) or not isinstance(found.get("args", argparse.Namespace()), argparse.Namespace):
            raise TypeError("it holds more than data and could run code")
    except Exception as error:  # whatever damaged content raises
        raise MoREError(
            f"checkpoint {checkpoint} is damaged: {_COMMON}, with its arguments, cannot be read ({last_line(error)}); "
            "load an older one with --ckpt-step"
        ) from error
    return found


def read_piece(checkpoint: Path, piece: Any) -> io.BytesIO:
    """Return what a data file holds of a tensor or an object, given the place that the checkpoint's index says.

    Raises:
        MoREError: If it is not as it was written. PyTorch writes an archive with checksums, and does not look at these
            when it reads.
    """
    with open(checkpoint / piece.relative_path, "rb") as file:
        file.seek(piece.offset)
        content = io.BytesIO(file.read(piece.length))
    try:
        with zipfile.ZipFile(content) as archive:
            is_whole = archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
        is_whole = False
    if not is_whole:
        place = f"bytes {piece.offset} to {piece.offset + piece.length} of {piece.relative_path}"
        raise MoREError(f"{place} are not what was written")
    content.seek(0)
    return content
