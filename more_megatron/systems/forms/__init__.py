"""Forms in which others publish models of our systems, one file each: a form is there because its file is."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.export import Row

if TYPE_CHECKING:
    import torch

__all__ = ["Form", "forms"]


class Form:
    """A form of a system's models, in the words of its authors' code: `config.json`, names and layouts of tensors.

    Wherever a method takes `config`, it is the content of our `config.json`.
    """

    name: ClassVar[str]  # its name, that of its file
    system: ClassVar[str]  # name of the system
    model_type: ClassVar[str]  # what `config.json` says
    note: ClassVar[str]  # what a reader of an export must know of it, in Markdown

    def faults(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield what the form cannot hold of a model, each one line."""
        yield from ()

    def to_form(self, config: Mapping[str, Any], args: Any) -> dict[str, Any]:
        """Return the content of the form's `config.json`, given that of ours and the arguments of the run."""
        raise NotImplementedError

    def from_form(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of our `config.json` that are not at their defaults, given the content of the form's.

        Raises:
            MoREError: If our model cannot be that.
        """
        raise NotImplementedError

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows outside of layers, with whole names."""
        raise NotImplementedError

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        """Return the rows of a layer, numbered from 0."""
        raise NotImplementedError

    def layer_prefix(self, config: Mapping[str, Any], layer: int) -> str:
        """Return what the names of a layer begin with."""
        raise NotImplementedError

    def buffers(self, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return tensors that the form stores and that follow from the configuration; they are not read."""
        return {}


@functools.cache
def forms() -> dict[str, Form]:
    """Return all forms by name, in alphabetical order."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FORM for name in found}
