"""Safetensors files of a model: planned beforehand, written and read a tensor at a time.

The header of a file holds the SHA-256 of each tensor, so that a bit that has flipped since is noticed. Whoever saves
the model anew writes headers without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.parameters import check_shapes
from more_megatron.hf.mapping import Entry
from more_megatron.systems.export import Layout

__all__ = ["Group", "SafetensorsFolder", "plan_files", "sha256", "tensor_bytes", "write_files"]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HASHES = "sha256"


@dataclass(frozen=True)
class Group:
    """Tensors that are written together."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.dtype.itemsize * sum(prod(shape) for shape in self.shapes)


def plan_files(groups: Sequence[Group], limit: int) -> list[list[Group]]:
    """Divide groups into files, in order; a group that is larger than the limit, in bytes, has a file of its own."""
    files: list[list[Group]] = [[]]
    for group in groups:
        if files[-1] and sum(part.size for part in files[-1]) + group.size > limit:
            files.append([])
        files[-1].append(group)
    # The format aligns each tensor to the size of its numbers.
    return [sorted(file, key=lambda group: -group.dtype.itemsize) for file in files]


def write_files(
    folder: Path, files: Sequence[Sequence[Group]], read: Callable[[Group], Sequence[torch.Tensor]]
) -> None:
    """Write the files of a model, and their index if there are several.

    Args:
        folder: Where to.
        files: From `plan_files`.
        read: Returns the tensors of a group; called once for each.
    """
    count = len(files)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = [_SINGLE] if count == 1 else names
    for name, file in zip(names, files, strict=True):
        _write(folder / name, file, read)
    if count > 1:
        placed = {tensor: name for name, file in zip(names, files, strict=True) for g in file for tensor in g.names}
        total = sum(group.size for file in files for group in file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, in order."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def sha256(tensor: torch.Tensor) -> str:
    """Return the hash of the bytes of a tensor."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _write(path: Path, groups: Sequence[Group], read: Callable[[Group], Sequence[torch.Tensor]]) -> None:
    # https://huggingface.co/docs/safetensors: length of the header, the header, the tensors without gaps.
    hashes = {name: "0" * 64 for group in groups for name in group.names}
    with open(path, "wb") as stream:
        stream.write(_header(groups, hashes))
        for group in groups:
            for name, tensor in zip(group.names, read(group), strict=True):
                stream.write(tensor_bytes(tensor))
                hashes[name] = sha256(tensor)
        # The same again, now that they are known.
        stream.seek(0)
        stream.write(_header(groups, hashes))


def _header(groups: Sequence[Group], hashes: dict[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt", _HASHES: json.dumps(hashes)}}
    offset = 0
    for group in groups:
        for name, shape in zip(group.names, group.shapes, strict=True):
            end = offset + group.dtype.itemsize * prod(shape)
            content[name] = {"dtype": _NAMES[group.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Stored:
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, _Stored] = {}
        for file in self._files():
            with self._open(file) as opened:
                hashes = self._written_hashes(file, (opened.metadata() or {}).get(_HASHES, "{}"))
                for name in opened.keys():  # noqa: SIM118
                    if name in self._tensors:
                        both = f"{self._tensors[name].file} and {file}"
                        raise MoREError(f"{folder} holds {name} in both {both}: export the model again")
                    part = opened.get_slice(name)
                    self._tensors[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype(), hashes.get(name))

    def check(self, entries: Iterable[Entry], others: Iterable[str]) -> None:
        """Check that the folder holds exactly these parameters, in their shapes, and nothing else but some others.

        Raises:
            MoREError: If not.
        """
        parts = ((entry, *part) for entry in entries for part in zip(entry.names, entry.shapes, strict=True))
        expected = [(name, shape) for entry, name, shape in parts if name in self.names(entry)]
        found = {name: stored.shape for name, stored in self._tensors.items()}
        check_shapes(self.folder, found, expected, others, ", which its config.json asks for")

    def names(self, entry: Entry) -> tuple[str, ...]:
        """Return the names that a parameter has in the folder: one is enough where it may stand twice."""
        there = tuple(name for name in entry.names if name in self._tensors)
        return there if there and entry.layout is Layout.TWICE else entry.names

    def describe(self, entry: Entry) -> str:
        """Return how a parameter is called in a message."""
        return f"{entry.names[0]} of {self.folder}"

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a parameter.

        Raises:
            MoREError: If it is no floating point.
        """
        name = self.names(entry)[0]
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            path = self.folder / stored.file
            raise MoREError(f"{path} holds {name} as {stored.dtype}: save it in floating point")
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
            path = self.folder / stored.file
            raise MoREError(f"{path} is damaged: {name} is not what was written; copy the folder or export it again")
        return tensor

    def _files(self) -> list[str]:
        index, has_single = self.folder / _INDEX, (self.folder / _SINGLE).is_file()
        if not index.is_file():
            if not has_single:
                raise MoREError(f"{self.folder} holds no {_SINGLE}: name a folder with a Hugging Face model")
            return [_SINGLE]
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise MoREError(f"{index} is damaged: export the model again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise MoREError(f"{index} names the file {name}, which is not in its folder: export the model again")
        if has_single and _SINGLE not in names:
            raise MoREError(f"{self.folder} holds both {_SINGLE} and {_INDEX}: remove the one that is stale")
        return sorted(names)

    def _written_hashes(self, file: str, text: str) -> dict[str, str]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise MoREError(f"{self.folder / file} is damaged: its hashes cannot be read; copy it again") from error

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise MoREError(f"{path} is missing: copy the folder again") from error
        except (SafetensorError, OSError) as error:
            raise MoREError(f"{path} is damaged ({error}): copy the folder again") from error
