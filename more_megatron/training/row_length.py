"""Shorter rows at first: samples are cut into several, so that tokens a step and consumed samples stay the same."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron.training import get_args

from more_megatron.curriculum import Curriculum
from more_megatron.platform.training_loop import surround


def length_curriculum(args: argparse.Namespace) -> Curriculum | None:
    """Return the curriculum of the length of rows, None if it stays the same."""
    text = args.seq_length_curriculum
    return None if text is None else Curriculum(text, "--seq-length-curriculum")


def row_length(args: argparse.Namespace) -> int:
    """Return the length of rows in the training step under way: a function of its number alone."""
    curriculum = length_curriculum(args)
    return args.seq_length if curriculum is None else curriculum.at(args.curr_iteration)


def announce_row_length() -> None:
    """Let pipeline stages expect hidden states of the length of rows from each other."""
    surround("get_forward_backward_func", _get_schedule)


def _get_schedule(get_schedule: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Take the place of Megatron's function that chooses the schedule."""
    return functools.partial(_run, get_schedule(*args, **kwargs))


def _run(
    schedule: Callable[..., Any], *, seq_length: int, micro_batch_size: int, forward_only: bool, **kwargs: Any
) -> Any:
    """Take the place of Megatron's schedules, whose arguments these are."""
    if not forward_only:
        length = row_length(get_args())
        micro_batch_size, seq_length = micro_batch_size * seq_length // length, length
    return schedule(seq_length=seq_length, micro_batch_size=micro_batch_size, forward_only=forward_only, **kwargs)
