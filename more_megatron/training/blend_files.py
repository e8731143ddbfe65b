"""Files that name the data of a run, read before Megatron reads them: a split left out has no data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError

__all__ = ["read_blend_files"]

_SPLITS = ("train", "valid", "test")
# Megatron's, which it gives to --data-path only.
_DEFAULT_SPLIT = "969, 30, 1"


def read_blend_files(args: argparse.Namespace) -> None:
    """Put what `--per-split-data-args-path` says where the flags for each split would, and check `--data-args-path`.

    Raises:
        MoREError: If a file cannot be read or says something else.
    """
    if args.data_args_path is not None:
        if not _read("--data-args-path", args.data_args_path).split():
            raise MoREError(f"--data-args-path {args.data_args_path} is empty: write prefixes into it")
        args.split = args.split or _DEFAULT_SPLIT
    if args.per_split_data_args_path is None:
        return
    flag, path = "--per-split-data-args-path", args.per_split_data_args_path
    form = 'write {"train": [prefixes], "valid": [..], "test": [..]} into it'
    try:
        content: Any = json.loads(_read(flag, path))
    except json.JSONDecodeError as error:
        raise MoREError(f"{flag} {path} is not JSON ({error}): {form}") from error
    if not isinstance(content, dict) or not content.get("train") or not content.keys() <= set(_SPLITS):
        raise MoREError(f"{flag} {path} does not name the data of each split: {form}")
    for split in _SPLITS:
        prefixes = content.get(split) or None
        prefixes = prefixes.split() if isinstance(prefixes, str) else prefixes
        if prefixes is not None and not isinstance(prefixes, list):
            raise MoREError(f"{flag} {path} does not name prefixes for {split}: {form}")
        setattr(args, f"{split}_data_path", prefixes and [str(part) for part in prefixes])
    args.per_split_data_args_path = None


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise MoREError(f"{flag} {path} cannot be read ({error}): name a file of prefixes") from error
