"""The flags of data, and the data that they name, checked before any rank opens them."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from more_megatron.data.answers import check_answers, has_answers
from more_megatron.data.check import check_dataset
from more_megatron.data.indexed import idx_path, read_index
from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from more_megatron.errors import MoREError

_SPLITS = ("training", "validation", "test")
_FILE_SPLITS = ("train", "valid", "test")
# Megatron's, which it gives to --data-path only.
_DEFAULT_SPLIT = "969, 30, 1"
_REMOTE = ("s3://", "msc://")


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
    if not isinstance(content, dict) or not content.get("train") or not content.keys() <= set(_FILE_SPLITS):
        raise MoREError(f"{flag} {path} does not name the data of each split: {form}")
    for split in _FILE_SPLITS:
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


def data_blends(args: argparse.Namespace) -> list[tuple[list[str], list[float] | None]]:
    """Return the prefixes and weights of each blend that the data flags name: one, or one a split."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return list(filter(None, [blend, *(blend_per_split or [])]))


def data_prefixes(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the prefixes of all blends."""
    return tuple(prefix for prefixes, _ in data_blends(args) for prefix in prefixes)


def check_data(args: argparse.Namespace) -> None:
    """Check the data sets that the data flags name, and that each split has data. One rank of each node checks.

    Megatron's tokenizer is built.

    Raises:
        MoREError: If there are no data, a weight is not a positive number, or files are missing or damaged, were made
            with another tokenizer, or do not suffice for a split.
    """
    if args.mock_data or args.local_rank != 0:
        return
    if not data_prefixes(args):
        raise MoREError("there are no data to train on: give --data-path, or --mock-data for random tokens")
    for weight in (weight for _, weights in data_blends(args) for weight in weights or ()):
        if not 0 < weight < math.inf:
            raise MoREError(
                f"the weight {weight} of a blend of data must be above 0: leave its prefix out, or weigh it"
            )
    local = [prefix for prefix in data_prefixes(args) if not prefix.startswith(_REMOTE)]
    tokenizer: dict[str, Any] = {"vocab_size": get_tokenizer().vocab_size, "tokenizer_sha256": tokenizer_hash(args)}
    for prefix in local:
        check_dataset(prefix, **tokenizer)
    if args.loss_on_answers:
        masked = {prefix for prefix in local if has_answers(prefix)}
        if not masked:
            raise MoREError("--loss-on-answers, but no dataset has a mask: write one with tools/prepare_tasks.py")
        for prefix in sorted(masked):
            check_answers(prefix)
    if args.split is not None:
        for prefix in local:
            _check_split(prefix, args)


def tokenizer_hash(args: argparse.Namespace) -> str | None:
    """Return the hash of the files of the run's tokenizer, None if it has none."""
    return tokenizer_sha256(TokenizerOptions.from_args(args))


def _check_split(prefix: str, args: argparse.Namespace) -> None:
    """Check that each split with a share of the data has a token in it, and a sequence where it is read but once.

    Megatron's builder looks for the epoch in which an empty split is long enough, without end.
    """
    index = read_index(idx_path(prefix))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for name, share in zip(_SPLITS, matrix, strict=True):
        if share is None:
            if name == "training" and not args.skip_train:
                raise MoREError(f"--split {args.split} leaves nothing for training: give the first part a share")
            continue
        # Rounded as Megatron's builder does.
        first, last = (round(bound * float(index.sequence_count)) for bound in share)
        tokens = int(index.lengths[first:last].sum(dtype=np.int64))
        needed = args.seq_length + 1 if name == "validation" and args.full_validation else 1
        if tokens < needed:
            raise MoREError(
                f"--split {args.split} gives the {name} set {last - first} of the {index.sequence_count} documents of "
                f"{prefix}, {tokens} tokens of {needed} at least: give it a larger share or 0, as in --split 90,10,0"
            )
