"""Forms in which others publish models of our systems, one file each: a form is there because its file is."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from more_megatron.errors import MoREError
from more_megatron.systems.forms.base import Form

__all__ = ["Form", "find_form", "form_of_type", "names"]

_INTERFACE = "base"


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all forms, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != _INTERFACE))


def find_form(name: str) -> Form:
    """Return a form by name.

    Raises:
        MoREError: If there is no such form.
    """
    if name not in names():
        raise MoREError(f"--format {name} does not exist: choose one of more, {', '.join(names())}")
    form: Form = importlib.import_module(f"{__name__}.{name}").FORM
    return form


def form_of_type(model_type: str | None) -> Form | None:
    """Return the form whose `config.json` names this type of model; None if there is none."""
    return next((form for form in map(find_form, names()) if form.model_type == model_type), None)
