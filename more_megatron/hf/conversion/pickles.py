"""Reading pickled objects of a checkpoint without the classes they were made of.

A checkpoint's arguments hold members of Megatron's enumerations. Importing their modules takes seconds, and whatever a
pickle names would be called. Here only harmless types are built; everything else becomes an `Opaque`.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import types
from typing import Any

import torch

__all__ = ["Opaque", "load"]

_TYPES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch", "Size"): torch.Size,
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


class _Pickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = _Unpickler
    load = staticmethod(pickle.load)


def load(content: bytes) -> Any:
    """Return the object that `torch.save` wrote.

    Args:
        content: The whole file.
    """
    return torch.load(io.BytesIO(content), map_location="cpu", pickle_module=_Pickle, weights_only=False)
