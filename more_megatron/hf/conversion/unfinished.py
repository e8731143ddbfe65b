"""A folder that gets its name when it is complete."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from more_megatron.errors import MoREError

__all__ = ["unfinished_folder"]

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
    try:
        # What an earlier conversion left when it was killed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        folder.replace(final)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in _SPACE_ERRORS:
            raise MoREError(
                f"{final} cannot be written: {error.strerror}; free space or name another --save"
            ) from error
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
