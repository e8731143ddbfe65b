"""Safetensors files of a model: planned beforehand, written and read a tensor at a time.

The header of a file holds the SHA-256 of each tensor, so that a bit that has flipped since is noticed. Whoever saves
the model anew writes headers without them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from more_megatron.errors import MoREError

__all__ = ["Group", "SafetensorsFolder", "plan_files", "sha256", "tensor_bytes", "write_files"]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_INDEX = "model.safetensors.index.json"
_HASHES = "sha256"


@dataclass(frozen=True)
class Group:
    """Tensors that are written together.

    Attributes:
        names: Their names.
        shapes: Their shapes.
        dtype: Their dtype.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.dtype.itemsize * sum(prod(shape) for shape in self.shapes)


def plan_files(groups: Sequence[Group], limit: int) -> list[list[Group]]:
    """Divide groups into files, in order.

    Args:
        groups: What is to be written.
        limit: Largest size of a file in bytes; a larger group has a file of its own.
    """
    files: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if files[-1] and size + group.size > limit:
            files.append([])
            size = 0
        files[-1].append(group)
        size += group.size
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
    if count == 1:
        names = ["model.safetensors"]
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


class SafetensorsFolder:
    """The weights of a Hugging Face folder.

    Args:
        folder: With one file `model.safetensors`, or several and their index.

    Raises:
        MoREError: If there are no weights, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[str, str] = {}
        self._files: dict[str, str] = {}
        for file in self._list():
            for name in self._names(file):
                other = self._files.setdefault(name, file)
                if other != file:
                    raise MoREError(f"{folder} holds {name} in both {other} and {file}: export the model again")

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        with self._open(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        with self._open(self._files[name]) as file:
            code = file.get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise MoREError(f"{self.folder / self._files[name]} holds {name} as {code}: save it in floating point")
        return _DTYPES[code]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            MoREError: If it is not the one that was written.
        """
        path = self.folder / self._files[name]
        with self._open(self._files[name]) as file:
            # The file is mapped: a copy lets go of it.
            tensor = file.get_tensor(name).clone()
        if name in self._hashes and self._hashes[name] != sha256(tensor):
            raise MoREError(f"{path} is damaged: {name} is not what was written; copy the folder or export it again")
        return tensor

    def _list(self) -> list[str]:
        index, single = self.folder / _INDEX, "model.safetensors"
        has_single = (self.folder / single).is_file()
        if index.is_file():
            names = self._listed(index)
            if has_single and single not in names:
                raise MoREError(f"{self.folder} holds both {single} and {_INDEX}: remove the one that is stale")
            return names
        if not has_single:
            raise MoREError(f"{self.folder} holds no {single}: name a folder with a Hugging Face model")
        return [single]

    def _listed(self, index: Path) -> list[str]:
        """Return the files that an index names."""
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise MoREError(f"{index} is damaged: export the model again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise MoREError(f"{index} names the file {name}, which is not in its folder: export the model again")
        return sorted(names)

    def _names(self, file: str) -> Iterator[str]:
        with self._open(file) as opened:
            self._hashes |= self._written_hashes(file, (opened.metadata() or {}).get(_HASHES, "{}"))
            yield from opened.keys()

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
