"""A `--save` folder on disk: which of its checkpoints are complete, and what a kill can leave behind."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from more_megatron.console import say
from more_megatron.errors import MoREError
from more_megatron.pickles import read_metadata
from more_megatron.unfinished import write_whole

__all__ = [
    "RELEASE",
    "TRACKER",
    "checkpoint_to_load",
    "clear_for_save",
    "content_fault",
    "damage",
    "fault",
    "is_whole",
    "newest_clean_iteration",
    "newest_complete_iteration",
    "read_piece",
    "repair_tracker",
    "unnamed_iteration",
]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def checkpoint_to_load(folder: Path, step: int | None) -> Path | None:
    """Return the checkpoint that a run loads from a folder, that of a step or the newest; None if there is none."""
    if step is not None:
        return _iteration_folder(folder, step)
    unnamed = unnamed_iteration(folder)
    return _named_checkpoint(folder) if unnamed is None else _iteration_folder(folder, unnamed)


def unnamed_iteration(folder: Path) -> int | None:
    """Return the iteration of a checkpoint that was complete when a kill kept its name out of the tracker file.

    It is later than the one that is named there, and was completed later: one that was not is of a run that
    `--ckpt-step` left behind.
    """
    named = _named_checkpoint(folder)
    last = -1 if named is None or named.name == RELEASE else int(named.name.removeprefix("iter_"))
    later = ((number, path) for number, path in _checkpoints(folder) if number > last)
    since = _completion_time(named)
    return next((number for number, path in later if fault(path) is None and _completion_time(path) >= since), None)


def _named_checkpoint(folder: Path) -> Path | None:
    entry = _read_tracker(folder) or ""
    if entry == RELEASE:
        return folder / RELEASE
    return _iteration_folder(folder, int(entry)) if re.fullmatch(r"\d{1,18}", entry) else None


def _completion_time(checkpoint: Path | None) -> int:
    # metadata.json is written last.
    try:
        return (checkpoint / "metadata.json").stat().st_mtime_ns if checkpoint is not None else 0
    except OSError:
        return 0


def newest_complete_iteration(folder: Path, before: int | None = None) -> int | None:
    """Return the iteration of the newest complete checkpoint in a `--save` folder, None if there is none.

    Only those before an iteration count if one is given.
    """
    earlier = ((number, path) for number, path in _checkpoints(folder) if before is None or number < before)
    return next((number for number, path in earlier if fault(path) is None), None)


def newest_clean_iteration(folder: Path) -> int | None:
    """Return the iteration of the newest complete checkpoint whose parameters are whole and finite, None without one.

    It reads them.
    """
    return next((number for number, path in _checkpoints(folder) if fault(path) is None and _is_finite(path)), None)


def _is_finite(checkpoint: Path) -> bool:
    metadata = read_metadata(checkpoint)
    for index, piece in metadata.storage_data.items():
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        if not is_tensor or index.fqn.startswith(("optimizer.", "chained_")):
            continue
        content = read_piece(checkpoint, piece)
        if not is_whole(content):
            return False
        tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if not bool(tensor.isfinite().all()):
            return False
    return True


def damage(folder: Path, checkpoint: Path, found: str) -> MoREError:
    """Return what refuses a checkpoint of a `--save` folder in which a fault was found: it names another one."""
    others = ((number, path) for number, path in _checkpoints(folder) if path != checkpoint)
    complete = next((number for number, path in others if fault(path) is None), None)
    remedy = (
        "there is no complete one beside it"
        if complete is None
        else f"--ckpt-step {complete} loads the newest complete one beside it"
    )
    return MoREError(f"checkpoint {checkpoint} is damaged: {found}; {remedy}")


def repair_tracker(folder: Path) -> None:
    """Make the tracker file name the newest complete checkpoint again if a kill left it empty or not yet written.

    Raises:
        MoREError: If the tracker file cannot be read, or is damaged and there is no complete checkpoint beside it.
    """
    if _named_checkpoint(folder) is not None:
        return
    entry, tracker = _read_tracker(folder), folder / TRACKER
    complete = newest_complete_iteration(folder)
    if complete is not None:
        say(f"> {tracker} is missing or damaged; continuing from the newest complete checkpoint, {complete}")
        write_whole(tracker, str(complete))
    elif entry is not None and not _checkpoints(folder):
        raise MoREError(f"{tracker} is damaged and there is no checkpoint beside it: load another folder, or remove it")
    elif entry is not None:
        say(f"> {tracker} was left by a save that did not finish, the first one: starting anew")
        tracker.unlink()


def clear_for_save(folder: Path, iteration: int) -> None:
    """Remove what is in the way of the checkpoint of an iteration: an older run's, or one that is not complete.

    Files of two saves under one name would pass for one checkpoint if the second save did not finish. The tracker file
    is moved first, so that at every moment it names a complete checkpoint or is not there.
    """
    checkpoint = _iteration_folder(folder, iteration)
    if not checkpoint.exists():
        return
    if _read_tracker(folder) == str(iteration):
        (folder / TRACKER).unlink()
        earlier = newest_complete_iteration(folder, before=iteration)
        if earlier is not None:
            write_whole(folder / TRACKER, str(earlier))
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    # metadata.json is what makes a checkpoint complete; without it what remains after a kill is none.
    (checkpoint / "metadata.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def fault(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, None if they are all there and whole."""
    if not checkpoint.is_dir():
        return "the folder does not exist"
    try:
        backend = json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return "metadata.json is missing or damaged, as after a save that did not finish"
    if backend != "torch_dist":
        return f"it is of the format {backend}, not torch_dist"
    try:
        pieces = _pieces(checkpoint).items()
        sizes = {name: max(info.offset + info.length for info in infos) for name, infos in pieces}
    except MoREError as error:
        return str(error)
    except Exception:  # whatever a damaged pickle raises
        return ".metadata is missing or cannot be read"
    for name, size in sorted(sizes.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)"
    return None


def content_fault(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """Return what is wrong inside the data files of a checkpoint, None if each tensor is as it was written.

    The checkpoint has no `fault`. Each rank looks at its part of the files, about as much as it is going to load.
    """
    pieces = _pieces(checkpoint)
    for name in sorted(pieces)[rank::ranks]:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        with open(checkpoint / name, "rb") as file:
            for info in pieces[name]:
                file.seek(info.offset)
                if not is_whole(file.read(info.length)):
                    return f"bytes {info.offset} to {info.offset + info.length} of {name} are not what was written"
    return None


def read_piece(checkpoint: Path, piece: Any) -> bytes:
    """Return what a data file holds of a tensor or an object, given the place that the checkpoint's index says."""
    with open(checkpoint / piece.relative_path, "rb") as file:
        file.seek(piece.offset)
        return file.read(piece.length)


def is_whole(content: bytes) -> bool:
    """Return whether such bytes are as they were written.

    PyTorch writes an archive with checksums, and does not look at these when it reads.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
        return False


def _pieces(checkpoint: Path) -> dict[str, list[Any]]:
    """Return by data file where each tensor of it begins and how long it is, as the checkpoint's index says."""
    pieces: dict[str, list[Any]] = {}
    for info in read_metadata(checkpoint).storage_data.values():
        pieces.setdefault(info.relative_path, []).append(info)
    return pieces


def _iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return iterations and folders of checkpoints, complete or not, the newest first."""
    names = [path.name.removeprefix("iter_") for path in folder.glob("iter_*") if path.is_dir()]
    numbers = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return [(number, _iteration_folder(folder, number)) for number in numbers]


def _read_tracker(folder: Path) -> str | None:
    try:
        return (folder / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MoREError(f"{folder / TRACKER} cannot be read ({error.strerror}): name another folder") from error
