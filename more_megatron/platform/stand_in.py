"""The tables of stand-ins: what of other packages is replaced so that Megatron runs here, and why.

A stand-in replaces one attribute of a module or class. It names the file and the text in the `megatron-core` wheel
that makes it necessary, so that a test can tell when a newer wheel no longer needs it.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["StandIn", "Table", "install"]


@dataclass(frozen=True)
class StandIn:
    """One replaced attribute."""

    target: str  # module or class that holds the attribute, as `package.module` or `package.module:Class`
    name: str  # attribute that is replaced
    replacement: Any  # what takes its place
    why: str  # why the original does not do, in one line
    text: str  # text in the wheel that needs the stand-in
    file: str = ""  # the file that it is in, below `megatron/`; empty: that of the target

    @property
    def source(self) -> str:
        """The file of the wheel that has the text, below `megatron/`."""
        return self.file or self.target.partition(":")[0].removeprefix("megatron.").replace(".", "/") + ".py"

    def resolve(self) -> Any:
        """Return the object whose attribute is replaced, importing its module."""
        return pkgutil.resolve_name(self.target)


class Table(list[StandIn]):
    """Stand-ins, in the order in which they are installed."""

    def replaces(self, target: str, name: str, *, why: str, text: str, file: str = "") -> Callable[[Any], Any]:
        """Return what enters a function into the table; arguments as the attributes of `StandIn`."""

        def enter(replacement: Any) -> Any:
            self.append(StandIn(target, name, replacement, why, text, file))
            return replacement

        return enter

    def surrounds(self, target: str, name: str, **facts: str) -> Callable[[Any], Any]:
        """Return what does so with a function that calls, and gets as its first argument, what has stood there."""

        def enter(around: Any) -> Any:
            former = getattr(pkgutil.resolve_name(target), name)

            @functools.wraps(around)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                return around(former, *args, **kwargs)

            self.replaces(target, name, **facts)(replacement)
            return around

        return enter


def install(table: Iterable[StandIn]) -> Callable[[], None]:
    """Put every stand-in of `table` in place, and return a function that puts the originals back."""
    originals = []
    for stand_in in table:
        holder, replacement = stand_in.resolve(), stand_in.replacement
        original = inspect.getattr_static(holder, stand_in.name)
        originals.append((holder, stand_in.name, original))
        setattr(holder, stand_in.name, staticmethod(replacement) if isinstance(original, staticmethod) else replacement)

    def restore() -> None:
        for holder, name, original in reversed(originals):
            setattr(holder, name, original)

    return restore
