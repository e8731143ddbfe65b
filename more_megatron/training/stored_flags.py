"""What a run takes from the checkpoint that it goes on from, where the command line does not say it."""

import argparse
from pathlib import Path
from typing import Any

from megatron.training.checkpointing import load_args_from_checkpoint

from more_megatron.checkpoint_files import checkpoint_to_load, fault, unnamed_iteration
from more_megatron.console import say
from more_megatron.data.tokenizers import TokenizerOptions
from more_megatron.flags import flag
from more_megatron.pickles import common_state
from more_megatron.systems import flag_names

_NAMES_OF_CODE = {"trust_remote_code", "metadata_path"}


class _Absent(list):
    """Stands in a namespace where no flag was given; a list, since some flags append to what is there."""


def given_flags(parser: argparse.ArgumentParser, command_line: list[str] | None = None) -> set[str]:
    """Return the names of the arguments that a command line sets, by default that of the program."""
    absent = {action.dest: _Absent() for action in parser._actions if action.dest != argparse.SUPPRESS}
    # The class's own, which this program's parser has replaced.
    found = argparse.ArgumentParser.parse_args(parser, command_line, namespace=argparse.Namespace(**absent))
    return {name for name, value in vars(found).items() if value is not absent.get(name)}


def take_stored_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Take from the checkpoint that `--load` names what was not given: MoRE's fields, and which checkpoint it is.

    They change what a model computes, mostly without changing a shape. With `--use-checkpoint-args` Megatron takes its
    own arguments as well.

    Raises:
        MoREError: If the arguments of the checkpoint cannot be read.
    """
    checkpoint = checkpoint_source(args)
    if checkpoint is None or args.ckpt_format != "torch_dist":
        return
    folder = checkpoint.parent
    unnamed = unnamed_iteration(folder) if args.ckpt_step is None else None
    if unnamed is not None:
        say(f"> {checkpoint} is complete, and the tracker file of {folder} does not name it yet: continuing from it")
        args.ckpt_step = unnamed
    if fault(checkpoint) is not None:  # said by `check_checkpoint`
        return
    stored = stored_arguments(checkpoint)
    if args.use_checkpoint_args:
        _take_megatron_arguments(args, stored, given)
    if "more_variant" in given and getattr(stored, "more_variant", None) != args.more_variant:
        return  # Of another system, which `check_checkpoint` refuses where it has to.
    for name in sorted(flag_names() - given):
        value = getattr(stored, name, None)
        if hasattr(stored, name) and value != getattr(args, name):
            say(f"> {flag(name)} {value}, as in {checkpoint}")
            setattr(args, name, value)


def stored_arguments(checkpoint: Path) -> argparse.Namespace:
    """Return the arguments of the run that saved a checkpoint, empty if it does not hold them.

    Raises:
        MoREError: If they cannot be read.
    """
    return common_state(checkpoint).get("args", argparse.Namespace())


def checkpoint_source(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that a run loads, None if there is none."""
    folders = (Path(folder) for folder in (args.load, args.pretrained_checkpoint) if folder is not None)
    return next(filter(None, (checkpoint_to_load(folder, args.ckpt_step) for folder in folders)), None)


def _take_megatron_arguments(args: argparse.Namespace, stored: argparse.Namespace, given: set[str]) -> None:
    """Take what Megatron takes, but not the name of code to import, and only once; and all that makes a tokenizer."""
    spec: Any = args.spec
    for name in ("pretrained_checkpoint", "load"):
        load_args_from_checkpoint(args, load_arg=name)
    args.spec, args.use_checkpoint_args = spec, False
    if args.use_tokenizer_model_from_checkpoint_args:
        for name in TokenizerOptions.__dataclass_fields__.keys() - given - _NAMES_OF_CODE:
            setattr(args, name, getattr(stored, name, getattr(args, name)))
