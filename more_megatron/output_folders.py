"""The folders a run writes to: tried before it starts, and that of `--save` kept from other runs.

A lock of the file system ends with the process that holds it, but only some file systems share locks between machines,
and some keep those of a machine that died. So the holder also touches the file: who waits for it, from another machine,
takes the folder over when the file stays as it is.
"""

import argparse
import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from more_megatron.console import say, write_start_to
from more_megatron.errors import MoREError
from more_megatron.flags import flag
from more_megatron.unfinished import try_lock

_FOLDERS = ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir")
_NAME = ".trainer.lock"
_BEAT_SECONDS = 5.0
# A process that was killed can take a moment to end; a machine that died is silent for longer than a few beats.
_PATIENCE_HERE_SECONDS = 10.0
_PATIENCE_ELSEWHERE_SECONDS = 30.0

_held: tuple[Path, str] | None = None


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


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Keep other runs out of a `--save` folder, which exists.

    Raises:
        MoREError: If another run writes into it.
    """
    global _held
    path = folder / _NAME
    with open(path, "a+") as file:
        _wait_for(file, path)
        token = f"{_machine()} {os.getpid()} {uuid.uuid4()}"
        _write(file, token)
        stop = threading.Event()
        threading.Thread(target=_beat, args=(path, stop), name="beat", daemon=True).start()
        _held = path, token
        try:
            yield
        finally:
            stop.set()
            _held = None
            if _token(path) == token:
                # Not removed: who waits for it has it open.
                _write(file, "")


def check_still_held() -> None:
    """Check that no other run took the folder over while this one stood still.

    Raises:
        MoREError: If one did.
    """
    if _held is not None and _token(_held[0]) != _held[1]:
        raise MoREError(f"another run writes to --save {_held[0].parent} since: this one ends, and saves nothing")


def _machine() -> str:
    # Of one boot of a kernel: containers share it, machines of one name do not.
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _token(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _write(file: IO[str], token: str) -> None:
    file.truncate(0)
    file.write(token)
    file.flush()


def _wait_for(file: IO[str], path: Path) -> None:
    """Wait until the run that last wrote into the folder, if it did not say goodbye, is certain to have ended."""
    token = _token(path)
    if token and not token.startswith(_machine()):
        _wait_while_beating(path)
    deadline = time.monotonic() + _PATIENCE_HERE_SECONDS
    while not try_lock(file):
        # A lock that outlived its machine has no beat.
        if not _token(path).startswith(_machine()):
            return
        if time.monotonic() > deadline:
            raise _taken(path.parent)
        time.sleep(0.2)


def _wait_while_beating(path: Path) -> None:
    say(f"> {path.parent} was last written to from another machine: waiting whether its run is alive")
    first = path.stat().st_mtime_ns
    deadline = time.monotonic() + _PATIENCE_ELSEWHERE_SECONDS
    while time.monotonic() < deadline and _token(path):
        if path.stat().st_mtime_ns != first:
            raise _taken(path.parent)
        time.sleep(1.0)


def _taken(folder: Path) -> MoREError:
    return MoREError(f"another run writes to --save {folder}: end it, or give this one a folder of its own")
