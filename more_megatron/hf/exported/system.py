"""Finds a system by its name: the file of that name in this folder, wherever the folder is."""

from __future__ import annotations

import importlib
from pathlib import Path

from .interface import System

__all__ = ["find_system", "system_names"]

_FOLDER = Path(__file__).parent


def system_names() -> tuple[str, ...]:
    """Return the names of the systems in this folder."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if "\nSYSTEM = " in path.read_text()))


def find_system(name: str) -> System:
    """Return the system of a name.

    Raises:
        ValueError: If there is no such file.
    """
    names = system_names()
    if name not in names:
        raise ValueError(f"variant {name!r} does not exist: choose one of {', '.join(names)}")
    return importlib.import_module(f".{name}", __package__).SYSTEM
