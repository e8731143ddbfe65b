"""Flags that Megatron's parser takes and that pretraining never reads: given explicitly, they are refused.

`tests/training/test_unread_flags.py` looks through the wheel for what reads each flag, and keeps this table as it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

__all__ = ["OTHER_PROGRAMS", "UNREAD", "unread_flags"]

# Groups of flags, and single ones, of what else is made with Megatron: inference, retrieval, vision.
OTHER_PROGRAMS = re.compile(
    r"^(biencoder|inference|rl|sft|vision)$|inference|prefill|mamba|^(bert|logits_load|mask_prob|short_seq|vocab_extra)"
)

# What each is to be replaced by.
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


def unread_flags(parser: argparse.ArgumentParser, given: set[str]) -> Iterator[str]:
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
