"""The folders a run writes to: tried before it starts, and kept from other runs."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from more_megatron.checkpoint_lock import only_trainer
from more_megatron.console import say, write_start_to
from more_megatron.errors import MoREError
from more_megatron.flags import flag

__all__ = ["output_folders"]

_FOLDERS = ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir")


def output_folders(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Make the folders that flags name, and return what keeps other runs out of that of `--save`.

    Rank 0 does so for all. What Megatron says of the start goes into `--save` from then on.

    Raises:
        MoREError: If a folder cannot be made or written to; in the block, if another run writes into `--save`.
    """
    if args.rank == 0:
        _make_folders(args)
    write_start_to(args.save)
    saves = args.rank == 0 and args.save and not args.skip_train
    return only_trainer(Path(args.save)) if saves else contextlib.nullcontext()


def _make_folders(args: argparse.Namespace) -> None:
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
