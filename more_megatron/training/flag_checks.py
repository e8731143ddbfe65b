"""Checks of a command line: flags that nothing reads, values that cannot be converted, and the table of what may be."""

import enum
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Set

from more_megatron.errors import MoREError
from more_megatron.flags import check_ranges, flag
from more_megatron.systems import flag_names
from more_megatron.training.flag_table import NEEDS, RANGES, broken_rules

# Flags that Megatron's parser takes and that pretraining never reads: groups, and single ones, of inference, retrieval,
# vision and so on; and others, with what each is to be replaced by. `tests/training/test_unread_flags.py` looks through
# the wheel for what reads each flag, and keeps both as they are.
OTHER_PROGRAMS = re.compile(
    r"^(biencoder|inference|rl|sft|vision)$|inference|prefill|mamba|^(bert|logits_load|mask_prob|short_seq|vocab_extra)"
)
UNREAD = {
    "rampup_batch_size": "give --step-batch-size-schedule '0:32 1M:64' (tokens:sequences), not --global-batch-size",
    "use_flash_attn": "give --attention-backend flash",
    "exit_signal_handler_for_dataloader": "give --exit-signal-handler",
    "enable_full_sharding_in_hsdp": "leave it out",
    "apply_residual_connection_post_layernorm": "leave it out",
    "openai_gelu": "leave it out",
    "onnx_safe": "leave it out",
    "dist_ckpt_save_pre_mcore_014": "leave it out",
}


def unread_flags(parser: ArgumentParser, given: Set[str]) -> Iterator[str]:
    """Yield for each flag that is given in vain one line that says so."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest not in given or action.dest.endswith("_deprecated"):
                continue
            option = action.option_strings[0]
            if action.dest in UNREAD:
                yield f"{option} has no effect: {UNREAD[action.dest]}"
            elif any(OTHER_PROGRAMS.search(name) for name in (group.title or "", action.dest)):
                yield f"{option} has no effect in pretraining: leave it out"


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


def check_flags(args: Namespace, given: Set[str]) -> None:
    """Check parsed flags, before Megatron does, given the names of those that the command line sets.

    Raises:
        MoREError: If a flag is wrong; the message names it and says how to mend it.
    """
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
    for fault in broken_rules(args):
        raise MoREError(re.sub(r"\{(\w+)\}", lambda found: f"{flag(found[1])} {getattr(args, found[1])}", fault))
