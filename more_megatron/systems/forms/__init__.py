"""Forms of a model in transformers: our own, and those in which others publish it, which are here by their files."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems import get_system
from more_megatron.systems.export import Row

if TYPE_CHECKING:
    import torch

__all__ = ["OURS", "Form", "forms"]


class Form:
    """Our own form; a subclass is that of one system in the words of its authors' code.

    Wherever a method takes `config`, it is the content of our `config.json`.
    """

    name: ClassVar[str] = "more"  # its name, that of its file
    model_type: ClassVar[str] = "more"  # what `config.json` says
    system: ClassVar[str | None] = None  # name of the system; None: any
    note: ClassVar[str | None] = None  # what a reader of an export must know of it, in Markdown

    def faults(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield what the form cannot hold of a model, each one line."""
        yield from ()

    def to_form(self, config: Mapping[str, Any], args: Any) -> dict[str, Any]:
        """Return the content of the form's `config.json`, given that of ours and the arguments of the run."""
        return dict(config)

    def from_form(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of our `config.json`, of another form those that are not at their defaults, given its own.

        Raises:
            MoREError: If our model cannot be that.
        """
        return dict(found)

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows outside of layers, with whole names."""
        return get_system(config["variant"]).model_rows(config)

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        """Return the rows of a layer, numbered from 0."""
        return get_system(config["variant"]).layer_rows(config, layer)

    def layer_prefix(self, config: Mapping[str, Any], layer: int) -> str:
        """Return what the names of a layer begin with."""
        return f"model.layers.{layer}."

    def buffers(self, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return tensors that the form stores and that follow from the configuration; they are not read."""
        return {}


OURS = Form()


@functools.cache
def forms() -> dict[str, Form]:
    """Return all forms by name: ours, and the others in alphabetical order."""
    others = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {OURS.name: OURS} | {name: importlib.import_module(f"{__name__}.{name}").FORM for name in others}
