"""Files and folders that get their names when they are complete."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from more_megatron.errors import MoREError, is_out_of_space

LOCK = "lock"
"""The file in a folder that whoever holds it has locked."""


@contextlib.contextmanager
def unfinished_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside `final`, which takes its name when the block ends, and is removed if it fails.

    Raises:
        MoREError: If there is something under the final name, another process writes it, or there is no place to write
            to.
    """
    final = final.absolute()
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise MoREError(f"--save {final} exists and is not an empty folder: remove it or name another")
    folder = final.parent / f".{final.name}.partial"
    taken = f"another process writes {final}: wait for it, or name another --save"
    with hold(folder, taken), _removed_on_failure(folder, final):
        empty(folder)
        yield folder
        folder.replace(final)
        (final / LOCK).unlink()


@contextlib.contextmanager
def unfinished_file(final: Path) -> Iterator[Path]:
    """Yield the name of a file beside `final`, which takes its name when the block ends, and is removed if it fails.

    Raises:
        MoREError: If there is no place to write to.
    """
    path = final.parent / f".{final.name}.partial"
    with _removed_on_failure(path, final):
        yield path
        path.replace(final)


def write_whole(final: Path, text: str) -> None:
    """Write a file that gets its name when it is complete.

    Raises:
        MoREError: If there is no place to write to.
    """
    with unfinished_file(final) as path:
        path.write_text(text, encoding="utf-8")


def hold(folder: Path, taken: str) -> IO[str]:
    """Make a folder, if it is not there, and keep others out of it until the returned file is closed.

    The lock ends with its process. Where a file system has no locks, nobody is kept out.

    Raises:
        MoREError: If another process holds the folder: `taken`.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the one that held it has removed or renamed it: once more
            lock = (folder / LOCK).open("a")
            if not try_lock(lock):
                raise MoREError(taken)
            if os.path.samestat(os.stat(folder / LOCK), os.fstat(lock.fileno())):
                return lock


def try_lock(file: IO[str]) -> bool:
    """Take the lock of a file, and return whether it was free; where a file system has no locks, it always is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def empty(folder: Path) -> None:
    """Remove what an earlier process, which was killed, left in a folder that this one holds."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def _removed_on_failure(path: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if is_out_of_space(error):
            raise MoREError(f"{final} cannot be written: there is no room; free some, or write elsewhere") from error
        raise
