"""Damaged checkpoints and those of other models are refused with one line; what a kill left is mended."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from more_megatron.checkpoint_files import (
    checkpoint_to_load,
    clear_for_save,
    fault,
    newest_complete_iteration,
    repair_tracker,
    unnamed_iteration,
)
from more_megatron.errors import MoREError
from tests.helpers.program import finished, pretrain_more, refused
from tests.helpers.training import TINY

_RUN = f"{TINY} --num-layers 2 --train-iters 4"
_TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    finished(f"{_RUN} --save {folder} --save-interval 2")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of those checkpoints."""
    return shutil.copytree(saved, tmp_path / "copy")


def _data_file(folder: Path) -> Path:
    return next((folder / "iter_0000004").glob("*.distcp"))


def _truncate(folder: Path) -> None:
    file = _data_file(folder)
    file.write_bytes(file.read_bytes()[:-100])


def _delete(folder: Path) -> None:
    _data_file(folder).unlink()


def _garble_index(folder: Path) -> None:
    (folder / "iter_0000004" / ".metadata").write_bytes(b"garbage" * 100)


def _unfinish(folder: Path) -> None:
    (folder / "iter_0000004" / "metadata.json").unlink()


def _garble_data(folder: Path) -> None:
    file = _data_file(folder)
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = b"\xa5" * (len(content) // 2)
    file.write_bytes(content)


def _garble_tensor(folder: Path) -> None:
    with open(_data_file(folder), "r+b") as file:
        file.seek(5000)
        file.write(b"\xa5" * 3000)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000004")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate, ("truncated", "--ckpt-step 2 loads the newest complete one beside it")),
        (_delete, ("is missing", "--ckpt-step 2")),
        (_garble_index, (".metadata is missing or cannot be read", "--ckpt-step 2")),
        (_unfinish, ("metadata.json is missing", "--ckpt-step 2")),
        (_garble_data, ("iter_0000004", "damaged")),
        (_garble_tensor, ("are not what was written", "--ckpt-step 2")),
        (_remove, ("the folder does not exist", "--ckpt-step 2")),
    ],
)
def test_damaged_checkpoint(folder: Path, damage: Callable[[Path], None], parts: tuple[str, ...]) -> None:
    damage(folder)
    refused(pretrain_more(1, f"{_RUN} --load {folder}")[0], str(folder), *parts)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--more-variant moe", "--more-variant was recurrent_moe and is moe now"),
        ("--num-layers 4", "--num-layers was 2 and is 4 now"),
        ("--hidden-size 64", "--hidden-size was 32 and is 64 now"),
        ("--num-experts 8", "--num-experts was 4 and is 8 now"),
        ("--group-query-attention --num-query-groups 2", "--group-query-attention was False and is True now"),
        ("--vocab-size 200", "--vocab-size was 127 and is 200 now"),
        ("--no-use-distributed-optimizer", "--use-distributed-optimizer was True and is False now"),
        ("--train-iters 40", "--override-opt-param-scheduler"),
    ],
)
def test_checkpoint_of_another_run(saved: Path, flags: str, part: str) -> None:
    refused(pretrain_more(1, f"{_RUN} --load {saved} {flags}")[0], part)


@pytest.mark.parametrize(
    "flags", ["--no-use-distributed-optimizer --no-load-optim", "--train-iters 6 --override-opt-param-scheduler"]
)
def test_what_the_refusal_advises_works(saved: Path, flags: str) -> None:
    finished(f"{_RUN} --load {saved} {flags} --ckpt-step 2")


def test_complete_checkpoints_have_no_fault(saved: Path) -> None:
    assert fault(saved / "iter_0000004") is None
    assert newest_complete_iteration(saved) == 4
    assert newest_complete_iteration(saved, before=4) == 2
    assert checkpoint_to_load(saved, None) == saved / "iter_0000004"
    assert checkpoint_to_load(saved, 2) == saved / "iter_0000002"


@pytest.mark.parametrize("content", ["", "x", "9" * 5000, None])
def test_tracker_is_mended(folder: Path, content: str | None) -> None:
    (folder / _TRACKER).unlink()
    if content is not None:
        (folder / _TRACKER).write_text(content)
    _unfinish(folder)
    repair_tracker(folder)
    assert (folder / _TRACKER).read_text() == "2"


def test_tracker_that_is_no_file(folder: Path) -> None:
    (folder / _TRACKER).unlink()
    (folder / _TRACKER).mkdir()
    with pytest.raises(MoREError, match=rf"{_TRACKER} cannot be read \(Is a directory\): name another folder"):
        repair_tracker(folder)


def test_whole_tracker_is_left_alone(folder: Path) -> None:
    (folder / _TRACKER).write_text("2\n")
    repair_tracker(folder)
    assert (folder / _TRACKER).read_text() == "2\n"


def test_complete_checkpoint_that_the_tracker_does_not_name(folder: Path) -> None:
    (folder / _TRACKER).write_text("2")
    assert unnamed_iteration(folder) == 4
    assert checkpoint_to_load(folder, None) == folder / "iter_0000004"
    output = _goes_on(folder)
    assert f"{folder / 'iter_0000004'} is complete, and the tracker file" in output
    assert " iteration        5/" in output
    # One that is not complete, or was completed before the one that is named, as one of an abandoned run, is left.
    (folder / _TRACKER).write_text("2")
    os.utime(folder / "iter_0000004" / "metadata.json", (1, 1))
    assert unnamed_iteration(folder) is None
    os.utime(folder / "iter_0000004" / "metadata.json")
    _unfinish(folder)
    assert checkpoint_to_load(folder, None) == folder / "iter_0000002"


def _goes_on(folder: Path, flags: str = "") -> str:
    return finished(f"{_RUN} --train-iters 6 --override-opt-param-scheduler --load {folder} {flags}")


def test_folder_of_a_conversion_is_saved_into(folder: Path) -> None:
    (folder / "iter_0000004").rename(folder / "release")
    shutil.rmtree(folder / "iter_0000002")
    (folder / _TRACKER).write_text("release")
    output = _goes_on(folder, f"--save {folder} --save-interval 2 --save-retain-interval 4")
    assert " iteration        1/" in output
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    assert (folder / "release").is_dir()
    # What `--ckpt-step` names stands above a release.
    (folder / _TRACKER).write_text("release")
    output = _goes_on(folder, "--ckpt-step 4")
    assert " iteration        5/" in output


def test_tracker_without_any_checkpoint(tmp_path: Path) -> None:
    repair_tracker(tmp_path)
    assert checkpoint_to_load(tmp_path, None) is None
    (tmp_path / _TRACKER).write_text("")
    with pytest.raises(MoREError, match="is damaged and there is no checkpoint beside it"):
        repair_tracker(tmp_path)
    # The first save was cut short in its tracker file, and its folder then lost: nothing to go on from.
    (tmp_path / "iter_0000002").mkdir()
    repair_tracker(tmp_path)
    assert checkpoint_to_load(tmp_path, None) is None


def test_save_clears_what_is_in_its_way(folder: Path) -> None:
    clear_for_save(folder, 4)
    assert not (folder / "iter_0000004").exists()
    assert (folder / _TRACKER).read_text() == "2"
    clear_for_save(folder, 2)
    assert not (folder / "iter_0000002").exists()
    assert not (folder / _TRACKER).exists()
    clear_for_save(folder, 6)
