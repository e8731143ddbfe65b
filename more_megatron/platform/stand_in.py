"""The tables of stand-ins: what of other packages is replaced so that Megatron runs here, and why.

A stand-in replaces one attribute of a module or class. It names the file and the text in the `megatron-core` wheel
that makes it necessary, so that a test can tell when a newer wheel no longer needs it.
"""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """One replaced attribute."""

    name: str  # what is replaced, as `package.module:attribute` or `package.module:Class.attribute`
    replacement: Any  # what takes its place
    why: str  # why the original does not do, in one line
    text: str  # text in the wheel that needs the stand-in
    file: str = ""  # the file that it is in, below `megatron/`; empty: that of what is replaced

    @property
    def source(self) -> str:
        """The file of the wheel that has the text, below `megatron/`."""
        return self.file or self.name.partition(":")[0].removeprefix("megatron.").replace(".", "/") + ".py"

    def place(self) -> tuple[Any, str]:
        """Return the module or class whose attribute is replaced, importing it, and the name of the attribute."""
        module, _, path = self.name.partition(":")
        holder, _, attribute = path.rpartition(".")
        return pkgutil.resolve_name(f"{module}:{holder}"), attribute


class Table(list[StandIn]):
    """Stand-ins, in the order in which they are installed."""

    def replaces(self, name: str, *, why: str, text: str, file: str = "") -> Callable[[Any], Any]:
        """Return what enters a function into the table; arguments as the attributes of `StandIn`."""

        def enter(replacement: Any) -> Any:
            self.append(StandIn(name, replacement, why, text, file))
            return replacement

        return enter

    def surrounds(self, name: str, **facts: str) -> Callable[[Any], Any]:
        """Return what enters a function that is called with the original as its first argument, and may call it.

        Arguments are those of `replaces`. The original is looked up here, not when the row is put in place.
        """

        def enter(around: Any) -> Any:
            former = pkgutil.resolve_name(name)

            @functools.wraps(around)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                return around(former, *args, **kwargs)

            self.replaces(name, **facts)(replacement)
            return around

        return enter


def install(table: Iterable[StandIn]) -> Callable[[], None]:
    """Put every stand-in of `table` in place, and return a function that puts the originals back."""
    originals = []
    for stand_in in table:
        (holder, name), replacement = stand_in.place(), stand_in.replacement
        original = inspect.getattr_static(holder, name)
        originals.append((holder, name, original))
        setattr(holder, name, staticmethod(replacement) if isinstance(original, staticmethod) else replacement)

    def restore() -> None:
        for holder, name, original in reversed(originals):
            setattr(holder, name, original)

    return restore
