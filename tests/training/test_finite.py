"""Numbers that are not finite end a run in one line, and no checkpoint holds them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from more_megatron.checkpoint_files import newest_clean_iteration
from tests.helpers import interruptions
from tests.helpers.program import Ended, pretrain_more, refused
from tests.helpers.training import TINY

_RUN = f"{TINY} --num-layers 2 --train-iters 5 --save-interval 2"
_UNCHECKED = "--no-check-for-nan-in-loss-and-grad"
_TRACKER = "latest_checkpointed_iteration.txt"


def _run(folder: Path, flags: str = "", spoil: Callable[[], None] | None = None, ranks: int = 1) -> list[Ended]:
    return pretrain_more(ranks, f"{_RUN} --save {folder} --load {folder} {flags}", prepare=spoil)


@pytest.mark.parametrize(
    ("spoil", "flags", "part"),
    [
        (interruptions.spoil_first_step, "", "iteration 1: found NaN in local forward loss"),
        (interruptions.spoil_first_step, _UNCHECKED, "of the model of iteration 2 are not finite"),
        (interruptions.spoil_third_step, "", "iteration 3: found NaN in local forward loss"),
        (interruptions.spoil_third_step, _UNCHECKED, "of the model of iteration 4 are not finite"),
        (interruptions.spoil_unused_row, "", "1 parameters of the model of iteration 4 are not finite, such as"),
        (interruptions.spoil_unused_row, "--async-save", "of the model of iteration 4 are not finite"),
    ],
)
def test_nothing_of_it_is_saved(tmp_path: Path, spoil: Callable[[], None], flags: str, part: str) -> None:
    [ended] = _run(tmp_path, flags, spoil)
    first = spoil is interruptions.spoil_first_step
    remedy = "there is no checkpoint with finite parameters" if first else "--ckpt-step 2 continues"
    refused(ended, part, "nothing was saved of it", remedy)
    saved = [] if first else ["iter_0000002"]
    assert [path.name for path in tmp_path.glob("iter_*")] == saved
    assert not first or not (tmp_path / _TRACKER).exists()
    # The same command goes on from what is clean.
    [ended] = _run(tmp_path)
    assert ended.code == 0, ended.stderr


def test_first_step_of_a_resumed_run(tmp_path: Path) -> None:
    assert _run(tmp_path, "--exit-interval 4")[0].code == 0
    refused(_run(tmp_path, "", interruptions.spoil_first_step)[0], "iteration 5", "--ckpt-step 4 continues")
    assert (tmp_path / _TRACKER).read_text() == "4"


def test_on_one_of_two_ranks(tmp_path: Path) -> None:
    ranks = _run(tmp_path, "--tensor-model-parallel-size 2", interruptions.spoil_unused_row, ranks=2)
    speaking = [rank for rank in ranks if rank.stderr]  # Whichever comes first; the launcher ends the other.
    assert len(speaking) == 1
    refused(speaking[0], "2 parameters of the model of iteration 4", "--ckpt-step 2 continues")


def test_checkpoint_that_is_not_clean_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from more_megatron import checkpoint_files

    assert _run(tmp_path, "--exit-interval 4")[0].code == 0
    assert newest_clean_iteration(tmp_path) == 4
    clean = checkpoint_files._is_finite
    monkeypatch.setattr(checkpoint_files, "_is_finite", lambda path: path.name != "iter_0000004" and clean(path))
    assert newest_clean_iteration(tmp_path) == 2
    monkeypatch.undo()
    for data in (tmp_path / "iter_0000004").glob("*.distcp"):
        data.write_bytes(b"\xa5" * data.stat().st_size)
    assert newest_clean_iteration(tmp_path) == 2


@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_disk_that_is_full(tmp_path: Path, flags: str) -> None:
    [ended] = _run(tmp_path, flags, interruptions.refuse_writing)
    refused(ended, "cannot be saved", "No space left on device", "that of iteration 2 is complete")
    assert (tmp_path / _TRACKER).read_text() == "2"
    assert _run(tmp_path)[0].code == 0
