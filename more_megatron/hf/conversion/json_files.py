"""The JSON files of a Hugging Face model: `config.json`, and the arguments of the run for the way back."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.exported.fields import complete_fields
from more_megatron.hf.exported.system import find_system
from more_megatron.systems.forms import Form, forms

ARGS_FILE = "megatron_args.json"
# Where the run stood and on which machine: nothing that describes the model.
_OF_THE_MACHINE = frozenset(
    (
        *("rank", "local_rank", "world_size"),
        *("save", "load", "pretrained_checkpoint", "tensorboard_dir", "wandb_save_dir"),
        *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_cache_path"),
        *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
        *("iteration", "curr_iteration", "num_floating_point_operations_so_far"),
        *("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"),
        # Whether code of others may run is said on a command line.
        "trust_remote_code",
    )
)


def check_config(config: Mapping[str, Any]) -> None:
    """Check that every field of a `config.json` is there, has the right type and range, and agrees with the others.

    Raises:
        MoREError: If not.
    """
    try:
        find_system(str(config.get("variant"))).check_config(config)
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


def read_config(folder: Path) -> tuple[dict[str, Any], Form]:
    """Return the content of `config.json` in a folder, as ours has it, and the form that the folder has.

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
    form = next((form for form in forms().values() if form.model_type == kind), None)
    if form is None:
        known = ", ".join(form.model_type for form in forms().values())
        raise MoREError(f"--load {folder} is a model of type {kind}, not {known}")
    try:
        config = form.from_form(config)
        if form.system is not None:
            fields = complete_fields(find_system(form.system).all_fields, config)
            config = {"model_type": "more", "variant": form.system, **fields}
        check_config(config)
    except MoREError as error:
        raise MoREError(f"{path}: {error}; correct it, or export the model again") from error
    return config, form


def write_args(folder: Path, args: argparse.Namespace) -> None:
    """Write the arguments that JSON can hold, without those of the machine that the run was on."""
    kept = {name: value for name, value in vars(args).items() if name not in _OF_THE_MACHINE and _is_plain(value)}
    text = json.dumps(kept, indent=2, sort_keys=True, default=_description)
    (folder / ARGS_FILE).write_text(text + "\n")


def read_args(folder: Path) -> dict[str, Any]:
    """Return the arguments of the run that a folder was exported from; empty if it does not say.

    Raises:
        MoREError: If they are damaged.
    """
    path = folder / ARGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(), object_hook=_described)
        return {name: value for name, value in found.items() if name not in _OF_THE_MACHINE}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise MoREError(f"{path} is damaged: remove it, and the arguments are derived from config.json") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    # Not what only derives from these types, as members of enumerations do.
    return type(value) in (int, float, str, bool, type(None), torch.dtype)


def _description(dtype: torch.dtype) -> dict[str, str]:
    return {"dtype": str(dtype).removeprefix("torch.")}


def _described(found: dict[str, Any]) -> Any:
    dtype = getattr(torch, found["dtype"]) if found.keys() == {"dtype"} else None
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"{found} is no dtype")
    return found if dtype is None else dtype
