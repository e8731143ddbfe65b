"""`config.json` of a Hugging Face model of ours, checked against the description of its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.hf.exported.fields import FIELDS, Field, check_fields, complete_fields
from more_megatron.hf.exported.system import find_system, system_names
from more_megatron.systems.forms import Form, find_form, form_of_type
from more_megatron.systems.forms import names as form_names

__all__ = ["check_config", "check_links", "known_fields", "read_config"]

_REMEDY = "correct it, or export the model again"


def known_fields(variant: str) -> dict[str, Field]:
    """Return the fields that a model of a system has.

    Raises:
        MoREError: If transformers has no model of it.
    """
    if variant not in system_names():
        raise MoREError(f"system {variant} cannot be converted: there are {', '.join(system_names())}")
    return {**FIELDS, **find_system(variant).fields}


def check_config(config: Mapping[str, Any]) -> None:
    """Check that every field of a `config.json` is there, has the right type and range, and agrees with the others.

    Raises:
        MoREError: If not.
    """
    variant = str(config.get("variant"))
    fields = {name: field for name, field in known_fields(variant).items() if name in config or not field.of_calls}
    missing = [name for name in fields if name not in config]
    if missing:
        raise MoREError(f"it does not say {missing[0]}")
    try:
        check_fields(fields, config)
        find_system(variant).check(config)
    except ValueError as error:
        raise MoREError(str(error)) from error


def check_links(folder: Path) -> None:
    """Check that no file of a Hugging Face folder lies elsewhere; those of the hub's cache lie beside its snapshots.

    Raises:
        MoREError: If one does.
    """
    inside = folder.resolve()
    places = {inside, inside.parent.parent / "blobs"} if inside.parent.name == "snapshots" else {inside}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and path.resolve().parent not in places:
            raise MoREError(f"{path} is a link to {path.resolve()}, outside of its folder: put the file itself there")


def read_config(folder: Path) -> tuple[dict[str, Any], Form | None]:
    """Return the content of `config.json` in a folder, as ours has it, and the form that the folder has if not ours.

    Raises:
        MoREError: If it is not there, not of a model of ours, or not as the description of its fields says; or if files
            of the folder lie elsewhere.
    """
    check_links(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise MoREError(f"--load {folder} holds no config.json: name the folder of a Hugging Face model") from error
    except (ValueError, RecursionError) as error:
        raise MoREError(f"{path} is damaged: export the model again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    form = form_of_type(kind)
    if kind != "more" and form is None:
        known = ", ".join(("more", *(find_form(name).model_type for name in form_names())))
        raise MoREError(f"--load {folder} is a model of type {kind}, not {known}")
    try:
        if form is not None:
            fields = complete_fields(known_fields(form.system), form.from_form(config))
            config = {"model_type": "more", "variant": form.system, **fields}
        check_config(config)
    except MoREError as error:
        raise MoREError(f"{path}: {error}; {_REMEDY}") from error
    return config, form
