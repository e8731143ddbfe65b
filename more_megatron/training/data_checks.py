"""Checks of the data that a run is given, before any rank opens them."""

from __future__ import annotations

import argparse

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training import get_tokenizer

from more_megatron.data.answers import check_answers, has_answers
from more_megatron.data.check import check_datasets
from more_megatron.data.indexed import idx_path, read_index
from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from more_megatron.errors import MoREError
from more_megatron.training.datasets import data_blends

__all__ = ["check_data", "tokenizer_hash"]

_SPLITS = ("training", "validation", "test")
_REMOTE = ("s3://", "msc://")


def check_data(args: argparse.Namespace) -> None:
    """Check the data sets that the data flags name, and that each split has data. One rank of each node checks.

    Megatron's tokenizer is built.

    Raises:
        MoREError: If there are no data, files are missing or damaged, were made with another tokenizer, or do not
            suffice for a split.
    """
    if args.mock_data or args.local_rank != 0:
        return
    blends = data_blends(args)
    if not blends:
        raise MoREError("there are no data to train on: give --data-path, or --mock-data for random tokens")
    local = [[prefix for prefix in blend if not prefix.startswith(_REMOTE)] for blend in blends]
    for prefixes in local:
        check_datasets(prefixes, vocab_size=get_tokenizer().vocab_size, tokenizer_sha256=tokenizer_hash(args))
    if args.loss_on_answers:
        masked = {prefix for prefixes in local for prefix in prefixes if has_answers(prefix)}
        if not masked:
            raise MoREError("--loss-on-answers, but no dataset has a mask: write one with tools/prepare_tasks.py")
        for prefix in sorted(masked):
            check_answers(prefix)
    if args.split is not None:
        for prefix in local[0]:
            _check_split(prefix, args)


def tokenizer_hash(args: argparse.Namespace) -> str | None:
    """Return the hash of the files of the run's tokenizer, None if it has none."""
    options = TokenizerOptions(
        args.tokenizer_type, args.tokenizer_model, vocab_file=args.vocab_file, merge_file=args.merge_file
    )
    return tokenizer_sha256(options)


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
