"""Safetensors files of a model: planned beforehand, written and read a tensor at a time.

The header of a file holds the SHA-256 of each tensor, so that a bit that has flipped since is noticed. Whoever saves
the model anew writes headers without them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.parameters import check_shapes
from more_megatron.hf.mapping import Entry
from more_megatron.systems.export import Layout

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HASHES = "sha256"


def write_files(
    folder: Path, tensors: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor], max_shard_size: int
) -> None:
    """Write the files of a model, and their index if there are several.

    Args:
        folder: Where to.
        tensors: What there will be, on the meta device.
        read: Returns a tensor by name; called once for each.
        max_shard_size: Largest size of a file in bytes; a tensor that is larger has a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        # The format aligns each tensor to the size of its numbers.
        held = sorted(names, key=lambda name: -tensors[name].itemsize)
        _write(folder / file, {name: tensors[name] for name in held}, read)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, in order."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def sha256(tensor: torch.Tensor) -> str:
    """Return the hash of the bytes of a tensor."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _write(path: Path, tensors: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    # https://huggingface.co/docs/safetensors: length of the header, the header, the tensors without gaps.
    hashes = dict.fromkeys(tensors, "0" * 64)
    with open(path, "wb") as stream:
        stream.write(_header(tensors, hashes))
        for name in tensors:
            tensor = read(name)
            stream.write(tensor_bytes(tensor))
            hashes[name] = sha256(tensor)
        # The same again, now that they are known.
        stream.seek(0)
        stream.write(_header(tensors, hashes))


def _header(tensors: Mapping[str, torch.Tensor], hashes: dict[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt", _HASHES: json.dumps(hashes)}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        content[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Stored(NamedTuple):
    """Where a tensor is, and what its file's header says of it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    hash: str | None


class SafetensorsFolder:
    """The weights of a Hugging Face folder, in one file `model.safetensors` or in several with their index.

    Raises:
        MoREError: If there are no weights, or they are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, _Stored] = {}
        for file in self._files():
            with self._open(file) as opened:
                try:
                    hashes = dict(json.loads((opened.metadata() or {}).get(_HASHES, "{}")))
                except (ValueError, TypeError, RecursionError) as error:
                    raise MoREError(f"{path / file} is damaged: its hashes cannot be read; copy it again") from error
                for name in opened.keys():  # noqa: SIM118
                    if name in self._tensors:
                        both = f"{self._tensors[name].file} and {file}"
                        raise MoREError(f"{path} holds {name} in both {both}: export the model again")
                    part = opened.get_slice(name)
                    self._tensors[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype(), hashes.get(name))

    def check(self, entries: Sequence[Entry], others: Iterable[str]) -> None:
        """Check that the folder holds exactly these parameters, in their shapes, and nothing else but some others.

        Raises:
            MoREError: If not.
        """
        shapes = {name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)}
        expected = [(name, shapes[name]) for entry in entries for name in self.names(entry)]
        found = {name: stored.shape for name, stored in self._tensors.items()}
        check_shapes(self.path, found, expected, others)

    def names(self, entry: Entry) -> tuple[str, ...]:
        """Return the names that a parameter has in the folder: one is enough where it may stand twice."""
        there = tuple(name for name in entry.names if name in self._tensors)
        return there if there and entry.layout is Layout.TWICE else entry.names

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a parameter.

        Raises:
            MoREError: If it is no floating point.
        """
        name = self.names(entry)[0]
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            raise MoREError(f"{self.path / stored.file} holds {name} as {stored.dtype}: save it in floating point")
        return _DTYPES[stored.dtype]

    def read(self, entry: Entry) -> torch.Tensor:
        """Return a parameter in Megatron's layout; a `MoREError` is raised as by `tensor`."""
        return entry.merge([self.tensor(name) for name in self.names(entry)])

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            MoREError: If it is not the one that was written.
        """
        stored = self._tensors[name]
        with self._open(stored.file) as file:
            # The file is mapped: a copy lets go of it.
            tensor = file.get_tensor(name).clone()
        if stored.hash not in (None, sha256(tensor)):
            path = self.path / stored.file
            raise MoREError(f"{path} is damaged: {name} is not what was written; copy the folder or export it again")
        return tensor

    def _files(self) -> list[str]:
        index, has_single = self.path / _INDEX, (self.path / _SINGLE).is_file()
        if not index.is_file():
            if not has_single:
                raise MoREError(f"{self.path} holds no {_SINGLE}: name a folder with a Hugging Face model")
            return [_SINGLE]
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise MoREError(f"{index} is damaged: export the model again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise MoREError(f"{index} names the file {name}, which is not in its folder: export the model again")
        if has_single and _SINGLE not in names:
            raise MoREError(f"{self.path} holds both {_SINGLE} and {_INDEX}: remove the one that is stale")
        return sorted(names)

    def _open(self, file: str) -> Any:
        path = self.path / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise MoREError(f"{path} is missing: copy the folder again") from error
        except (SafetensorError, OSError) as error:
            raise MoREError(f"{path} is damaged ({error}): copy the folder again") from error
