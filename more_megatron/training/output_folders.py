"""The folders a run writes to, tried before it starts."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from more_megatron.checkpoint_lock import only_trainer
from more_megatron.console import say
from more_megatron.errors import MoREError
from more_megatron.flags import flag

__all__ = ["check_output_folders", "lock_save_folder"]

_FOLDERS = ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir")


def check_output_folders(args: argparse.Namespace) -> None:
    """Make the folders that flags name, and check that a file can be written there. Rank 0 checks for all.

    Raises:
        MoREError: If a folder cannot be made or written to.
    """
    if args.rank != 0:
        return
    if args.save_interval and not args.save:
        say("> --save-interval without --save: this run saves nothing")
    for name in _FOLDERS:
        folder = getattr(args, name)
        if not folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise MoREError(
                f"{flag(name)} {folder} is not a folder that can be written to ({error.strerror}): "
                "name another or change its permissions"
            ) from error


def lock_save_folder(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Keep other runs out of the folder that `--save` names. Rank 0 does so for all.

    Raises:
        MoREError: If another run writes into it.
    """
    saves = args.rank == 0 and args.save and not args.skip_train
    return only_trainer(Path(args.save)) if saves else contextlib.nullcontext()
