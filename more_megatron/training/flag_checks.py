"""Checks of parsed flags against the table of what they may be."""

from __future__ import annotations

import enum
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Set

from more_megatron.errors import MoREError
from more_megatron.flags import check_ranges, flag
from more_megatron.systems import flag_names, get_system
from more_megatron.training.flag_table import NEEDS, RANGES, RULES
from more_megatron.training.options import option_faults

__all__ = ["check_flags", "convert"]


def check_flags(args: Namespace, given: Set[str]) -> None:
    """Check parsed flags, before Megatron does, given the names of those that the command line sets.

    Raises:
        MoREError: If a flag is wrong; the message names it and says how to mend it.
    """
    get_system(args.more_variant)
    if args.use_checkpoint_args:
        raise MoREError("--use-checkpoint-args needs a whole checkpoint in --load: leave it out, or name another")
    if {"bf16", "fp16"} <= given and args.bf16:
        raise MoREError("--bf16 and --fp16 exclude each other: leave one out")
    if args.yaml_cfg is not None:  # The flags are not all there yet.
        return
    for name in sorted(given):
        if getattr(args, name, None) == "":
            raise MoREError(f"{flag(name)} is empty: give it a value or leave it out")
        if name not in flag_names():  # Those of ours are checked where a configuration is built of them.
            check_ranges(args, {name: next(interval for interval, names in RANGES if re.fullmatch(names, name))})
    for name, others in NEEDS.items():
        if name in given and not any(getattr(args, other) for other in others.split("|")):
            needed = " or ".join(map(flag, others.split("|")))
            raise MoREError(f"{flag(name)} needs {needed}: give both, or leave it out")
    for is_broken, text in RULES:
        if is_broken(args):
            raise MoREError(re.sub(r"\{(\w+)\}", lambda found: f"{flag(found[1])} {getattr(args, found[1])}", text))
    for fault in option_faults(args):
        raise MoREError(fault)


def convert(of_megatron: Callable[[str], object], choices: Iterable[enum.Enum], text: str) -> object:
    """Convert the text of a flag as Megatron does, by evaluation or a member's name, or refuse it as the parser does.

    `choices` are the members that may be named, if any.

    Raises:
        ArgumentTypeError: If it is nothing of the kind.
    """
    try:
        return of_megatron(text)
    except Exception as error:
        names = ", ".join(choice.name for choice in choices)
        raise ArgumentTypeError(f"invalid value: {text!r}{names and f' (choose from {names})'}") from error
