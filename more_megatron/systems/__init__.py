"""The systems, one file each, and the registry: a system is there because its file is.

Everything else iterates over the registry and knows no system by name. The names alone need neither Megatron nor
PyTorch, nor does a `System` until it is asked for its layers.
"""

import dataclasses
import functools
import importlib
import pkgutil

from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags
from more_megatron.systems.base import System

__all__ = ["System", "default_name", "flag_names", "get_system", "names", "systems"]

_INTERFACE = ("base", "divided", "export", "forms")


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all systems, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _INTERFACE))


@functools.cache
def get_system(name: str) -> System:
    """Return a system by name, or raise a `MoREError` that lists those there are."""
    if name not in names():
        raise MoREError(f"--more-variant {name} does not exist: choose one of {', '.join(names())}")
    system: System = importlib.import_module(f"{__name__}.{name}").SYSTEM
    return system


def default_name() -> str:
    """Return the name of the system that is trained if none is named."""
    return next((name for name, system in systems().items() if system.is_default), names()[0])


def flag_names() -> frozenset[str]:
    """Return the fields of the MoRE group: those that systems share, and those that each alone reads."""
    shared = frozenset(field.name for field in dataclasses.fields(MoREFlags))
    return shared.union(*(system.own_flags() for system in systems().values()))


def systems() -> dict[str, System]:
    """Return all systems by name."""
    return {name: get_system(name) for name in names()}
