"""Folders that are being written: one process holds them, whatever the one before did with them."""

import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest

from more_megatron.errors import MoREError
from more_megatron.unfinished import LOCK, empty, hold


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with hold(folder, "taken"):
        (folder / "old").mkdir()
        (folder / "old" / "file").touch()
        with pytest.raises(MoREError, match="taken"):
            hold(folder, "taken")
        empty(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    hold(folder, "taken").close()


@pytest.mark.parametrize("leave", [shutil.rmtree, lambda folder: folder.rename(folder.parent / "final")])
def test_a_lock_in_a_folder_that_has_gone_is_none(leave: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, locked = tmp_path / "folder", []

    flock = fcntl.flock

    def lock(file: Any, how: int) -> None:
        flock(file, how)
        if not locked:  # The one that held it finishes between the opening of the lock and its being free.
            leave(folder)
        locked.append(file)

    monkeypatch.setattr(fcntl, "flock", lock)
    with hold(folder, "taken"):
        assert len(locked) == 2
        assert (folder / LOCK).is_file()
