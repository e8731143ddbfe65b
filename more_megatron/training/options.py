"""Flags of the MoRE group that say how a run trains and not what a model is: no checkpoint sets them."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from more_megatron.curriculum import Curriculum

__all__ = ["TrainingFlags", "length_curriculum", "option_faults"]


@dataclass
class TrainingFlags:
    """How a run trains."""

    loss_on_answers: bool = False
    """Count the loss of answers only, where a dataset has a mask of them; problems of a row do not see each other.
    Implies --calculate-per-token-loss."""

    seq_length_curriculum: str | None = None
    """Length of training rows by iteration, as in 0:128,10000:256; samples of --seq-length are cut into these."""


def length_curriculum(args: argparse.Namespace) -> Curriculum | None:
    """Return the curriculum of the length of rows, None if it stays the same."""
    text = args.seq_length_curriculum
    return None if text is None else Curriculum(text, "--seq-length-curriculum")


def option_faults(args: argparse.Namespace) -> Iterator[str]:
    """Yield what these flags do not go together with, each one line."""
    curriculum = length_curriculum(args)
    lengths = [] if curriculum is None else curriculum.values
    for length in lengths:
        if args.seq_length % length != 0 or length % args.tensor_model_parallel_size != 0:
            yield (
                f"--seq-length-curriculum has rows of {length} tokens: their length must divide --seq-length "
                f"{args.seq_length} and be divisible by --tensor-model-parallel-size {args.tensor_model_parallel_size}"
            )
    others = [
        ("--context-parallel-size", args.context_parallel_size > 1),
        ("--reset-position-ids", args.reset_position_ids),
        ("--reset-attention-mask", args.reset_attention_mask),
        ("--dataloader-inter-document-masking", args.dataloader_inter_document_masking),
        ("--mtp-num-layers", bool(args.mtp_num_layers)),
    ]
    if args.loss_on_answers:
        others += [("--mock-data", args.mock_data), ("--seq-length-curriculum", curriculum is not None)]
    if args.loss_on_answers or curriculum is not None:
        given = "--loss-on-answers" if args.loss_on_answers else "--seq-length-curriculum"
        for other, is_given in others:
            if is_given:
                yield f"{given} divides rows by itself and does not go together with {other}: leave one of them out"
