"""The parameters of a model where they are read from: whether they are those of its configuration, and finite."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.mapping import Entry

_SHOWN = 3


class _Store(Protocol):
    """A checkpoint or a Hugging Face folder."""

    path: Path

    def dtype(self, entry: Entry) -> torch.dtype: ...

    def read(self, entry: Entry) -> torch.Tensor: ...


class Source:
    """The parameters of a model, in the dtypes of where they go.

    Args:
        store: Where they are.
        entries: All of them.
        dtype: Name of the dtype that they are cast to, but for those that stay in float32; None: they keep theirs.
    """

    def __init__(self, store: _Store, entries: Sequence[Entry], dtype: str | None) -> None:
        self.entries = entries
        self.rounded: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._store = store

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(prod(entry.shape) for entry in self.entries)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a parameter where it goes."""
        return torch.float32 if entry.fp32 else self.rounded or self._store.dtype(entry)

    def read(self, entry: Entry) -> torch.Tensor:
        """Return a parameter in Megatron's layout.

        Raises:
            MoREError: If it holds NaN or infinity, or the dtype is too narrow for it.
        """
        tensor, dtype = self._store.read(entry), self.dtype(entry)
        name = f"{entry.names[0]} ({entry.key}) of {self._store.path}"
        wrong = int((~tensor.isfinite()).sum())
        if wrong > 0:
            raise MoREError(
                f"{name} holds NaN or infinity in {wrong} of {tensor.numel()} places: convert an older checkpoint"
            )
        cast = tensor.to(dtype)
        if not bool(cast.isfinite().all()):
            raise MoREError(
                f"{name} reaches {tensor.abs().max().item():.3g}, which {dtype} cannot hold: use --dtype bfloat16"
            )
        return cast


def check_shapes(
    place: Path | str,
    found: Mapping[str, Sequence[int]],
    expected: Sequence[tuple[str, Sequence[int]]],
    others: Iterable[str] = (),
) -> None:
    """Check that there are exactly the tensors that are expected, in these shapes.

    Args:
        place: Where they are, in words.
        found: Shapes by name.
        expected: Names and shapes, of each row of the tables.
        others: Names of what may be there beside them.

    Raises:
        MoREError: If one is missing, unknown or of another shape.
    """
    for name, shape in expected:
        if name not in found:
            raise MoREError(f"{place} lacks the parameter {name}, which its configuration asks for")
        if tuple(found[name]) != tuple(shape):
            raise MoREError(f"{place} holds {name} in shape {list(found[name])} instead of {list(shape)}")
    unknown = sorted(found.keys() - dict(expected).keys() - set(others))
    if unknown:
        names = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        raise MoREError(f"{place} holds parameters that the mapping has no row for: {names}")
