"""A `--save` folder on disk: which of its checkpoints are complete, and what a kill can leave behind."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from more_megatron.console import say
from more_megatron.errors import MoREError, last_line
from more_megatron.pickles import model_tensors, read_metadata, read_piece
from more_megatron.unfinished import write_whole

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
    since = _completion_time(named)
    return next(_complete(folder, lambda number, path: number > last and _completion_time(path) >= since), None)


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
    """Return the iteration of the newest complete checkpoint, or the newest before another; None without one."""
    return next(_complete(folder, lambda number, _: before is None or number < before), None)


def newest_clean_iteration(folder: Path) -> int | None:
    """Return the iteration of the newest complete checkpoint whose parameters are whole and finite, None without one.

    It reads them.
    """
    return next((number for number in _complete(folder) if _is_finite(_iteration_folder(folder, number))), None)


def _is_finite(checkpoint: Path) -> bool:
    metadata = read_metadata(checkpoint)
    parameters = model_tensors(metadata)
    pieces = (piece for index, piece in metadata.storage_data.items() if index.fqn in parameters)
    try:
        contents = (
            torch.load(read_piece(checkpoint, piece), weights_only=True, map_location="cpu") for piece in pieces
        )
        return all(bool(content.isfinite().all()) for content in contents)
    except MoREError:
        return False


def check_files(checkpoint: Path) -> None:
    """Check that the files of a checkpoint are all there and whole.

    Raises:
        MoREError: If not; it names the newest complete checkpoint beside it.
    """
    if found := fault(checkpoint):
        raise _damage(checkpoint, found)


def check_content(checkpoint: Path, rank: int, ranks: int) -> None:
    """Check that each tensor in such files is as it was written.

    Each rank looks at its part of the files, about as much as it is going to load.

    Raises:
        MoREError: As above.
    """
    pieces = _pieces(checkpoint)
    try:
        for name in sorted(pieces)[rank::ranks]:
            for piece in pieces[name]:
                read_piece(checkpoint, piece)
    except (MoREError, OSError) as error:
        raise _damage(checkpoint, last_line(error)) from error


def _damage(checkpoint: Path, found: str) -> MoREError:
    complete = next(_complete(checkpoint.parent, lambda _, path: path != checkpoint), None)
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


def _complete(folder: Path, is_wanted: Callable[[int, Path], bool] = lambda number, path: True) -> Iterator[int]:
    """Yield the iterations of complete checkpoints, the newest first, that are wanted by iteration and folder."""
    return (number for number, path in _checkpoints(folder) if is_wanted(number, path) and fault(path) is None)


def _read_tracker(folder: Path) -> str | None:
    try:
        return (folder / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MoREError(f"{folder / TRACKER} cannot be read ({error.strerror}): name another folder") from error
