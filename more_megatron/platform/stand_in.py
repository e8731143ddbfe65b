"""The table of stand-ins: what is replaced so that Megatron runs without a GPU, and why.

A stand-in replaces one attribute of a module or class. It names the file and the text in the `megatron-core` wheel
that makes it necessary, so that a test can tell when a newer wheel no longer needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["StandIn", "install"]


@dataclass(frozen=True)
class StandIn:
    """One replaced attribute.

    Attributes:
        target: Module or class that holds the attribute, as `package.module` or `package.module:Class`.
        name: Attribute that is replaced.
        replacement: What takes its place.
        reason: Why the original does not work without a GPU, in one line.
        file: File of the wheel, below `megatron/`, whose code needs the stand-in.
        text: Text in that file that needs it.
    """

    target: str
    name: str
    replacement: Any
    reason: str
    file: str
    text: str

    def resolve(self) -> Any:
        """Return the object whose attribute is replaced, importing its module."""
        module_name, _, class_name = self.target.partition(":")
        module = import_module(module_name)
        return getattr(module, class_name) if class_name else module


def install(table: tuple[StandIn, ...]) -> Callable[[], None]:
    """Put every stand-in of `table` in place.

    Args:
        table: Stand-ins, installed in this order.

    Returns:
        A function that puts the originals back.
    """
    originals = []
    for stand_in in table:
        holder = stand_in.resolve()
        originals.append((holder, stand_in.name, getattr(holder, stand_in.name)))
        setattr(holder, stand_in.name, stand_in.replacement)

    def restore() -> None:
        for holder, name, original in reversed(originals):
            setattr(holder, name, original)

    return restore
