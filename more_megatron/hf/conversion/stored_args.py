"""Arguments of a run as JSON, for the way back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError

__all__ = ["ARGS_FILE", "read_args", "write_args"]

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


def write_args(folder: Path, args: argparse.Namespace) -> None:
    """Write the arguments that JSON can hold, without those of the machine that the run was on."""
    kept = {}
    for name, value in vars(args).items():
        if name not in _OF_THE_MACHINE and isinstance(value, torch.dtype):
            kept[name] = {"dtype": str(value).removeprefix("torch.")}
        elif name not in _OF_THE_MACHINE and _is_plain(value):
            kept[name] = value
    (folder / ARGS_FILE).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def read_args(folder: Path) -> dict[str, Any]:
    """Return the arguments of the run that a folder was exported from; empty if it does not say.

    Raises:
        MoREError: If they are damaged.
    """
    path = folder / ARGS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        return {name: _read(value) for name, value in found.items() if name not in _OF_THE_MACHINE}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise MoREError(f"{path} is damaged: remove it, and the arguments are derived from config.json") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    # Not what only derives from these types, as members of enumerations do.
    return type(value) in (int, float, str, bool, type(None))


def _read(value: Any) -> Any:
    found = getattr(torch, value["dtype"]) if isinstance(value, dict) else None
    if found is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"{value} is no dtype")
    return value if found is None else found
