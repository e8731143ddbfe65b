"""Files and folders that get their names when they are complete."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from more_megatron.errors import MoREError

__all__ = ["unfinished_file", "unfinished_folder"]

_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def unfinished_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside `final`, which takes its name when the block ends, and is removed if it fails.

    Raises:
        MoREError: If there is something under the final name, or no place to write to.
    """
    final = final.absolute()
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise MoREError(f"--save {final} exists and is not an empty folder: remove it or name another")
    folder = final.parent / f".{final.name}.partial"
    with _removed_on_failure(folder, final):
        # What an earlier conversion left when it was killed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        folder.replace(final)


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


@contextlib.contextmanager
def _removed_on_failure(path: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _SPACE_ERRORS:
            raise MoREError(
                f"{final} cannot be written: {error.strerror}; free space or name another --save"
            ) from error
        raise
