"""The cache of dataset indices that Megatron keeps beside the data, and what a kill can leave in it."""

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from more_megatron.console import say
from more_megatron.unfinished import try_lock

_DESCRIPTION = "description.txt"
_LOCK = ".index.lock"


def cache_folder(prefix: str) -> Path:
    """Return where Megatron caches the indices of a dataset without `--data-cache-path`."""
    return Path(prefix, "cache", "GPTDataset_indices")


@contextlib.contextmanager
def only_writer(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other runs out of cache folders, and wait for one that is writing: its indices look like those of a kill.

    The folders are created. The lock ends with the process that holds it. Where a file system has no locks, nothing is
    kept out.
    """
    with contextlib.ExitStack() as held:
        # In one order for all runs, so that no two wait for each other.
        for folder in sorted(set(folders)):
            with contextlib.suppress(OSError):  # said by Megatron, which writes there next
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(folder / _LOCK, "a"))
                if not try_lock(file):
                    say(f"> waiting for another run that builds dataset indices in {folder}")
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_unusable_indices(folders: Iterable[Path]) -> None:
    """Remove cached indices that are incomplete or older than their data, from folders that need not exist.

    Megatron writes an index in place and takes any file of the right name for a whole one. Its name says which dataset
    it is of, not what was in it: data that were preprocessed again would be read with the old index.
    """
    for folder in folders:
        for description in sorted(folder.glob(f"*-{_DESCRIPTION}")):
            group = sorted(folder.glob(description.name.removesuffix(_DESCRIPTION) + "*"))
            reason = _reason_to_remove(description, group)
            if reason is not None:
                say(f"> removing the dataset index {description.name.removesuffix('-' + _DESCRIPTION)}: {reason}")
                for path in group:
                    path.unlink(missing_ok=True)


def _reason_to_remove(description: Path, group: list[Path]) -> str | None:
    if not all(_is_whole(path) for path in group if path.suffix == ".npy"):
        return "it was not written to its end"
    prefixes: set[str | None] = set()

    def note(part: dict[str, Any]) -> None:
        prefixes.add(part.get("dataset_path"))

    try:
        # A blend nests the descriptions of its parts.
        json.loads(description.read_text(), object_hook=note)
    except ValueError:
        return "its description was not written to its end"
    oldest = min((path.stat().st_mtime for path in group), default=0.0)
    for prefix in prefixes - {None}:
        index = Path(f"{prefix}.idx")
        if index.is_file() and index.stat().st_mtime > oldest:
            return f"{index} is newer"
    return None


def _is_whole(path: Path) -> bool:
    """Return whether an array file is as long as its header says."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True
