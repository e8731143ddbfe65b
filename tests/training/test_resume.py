"""A run that is ended at any moment goes on from its newest complete checkpoint as if nothing had happened."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import interruptions
from tests.helpers.program import Program, finished, losses_by_iteration, pretrain_more
from tests.helpers.training import TINY

_ITERATIONS = 7
_RUN = (
    f"{TINY} --num-layers 2 --train-iters {_ITERATIONS} --expert-model-parallel-size 2 "
    "--attention-dropout 0.1 --hidden-dropout 0.1 --more-variant recurrent_moe "
    "--recurrence-sampling uniform --recurrence-min-steps 2 --recurrence-max-steps 4 --recurrence-backprop-steps 2 "
    "--save-interval 2"
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Return the losses of the run that nothing interrupts."""
    losses = losses_by_iteration(finished(_command(tmp_path_factory.mktemp("uninterrupted")), ranks=2))
    assert list(losses) == list(range(1, _ITERATIONS + 1))
    return losses


def _command(folder: Path) -> str:
    return f"{_RUN} --data-cache-path {folder / 'cache'} --save {folder} --load {folder}"


def _killed(command: str, trap: Callable[[], None]) -> None:
    ranks = pretrain_more(2, command, prepare=trap)
    assert -signal.SIGKILL in [rank.code for rank in ranks], ranks[0].stderr[-3000:]


@pytest.mark.parametrize(
    ("trap", "resumed_after"),
    [
        pytest.param(interruptions.kill_in_index_cache, 0, marks=pytest.mark.matrix),
        (interruptions.kill_in_data_file, 2),
        (interruptions.kill_before_checkpoint_is_complete, 2),
        (interruptions.kill_before_tracker, 4),
        (interruptions.kill_in_tracker, 4),
    ],
)
def test_goes_on_after_kill(
    tmp_path: Path, uninterrupted: dict[int, str], trap: Callable[[], None], resumed_after: int
) -> None:
    command = _command(tmp_path)
    _killed(command, trap)
    losses = losses_by_iteration(finished(command, ranks=2))
    assert losses == {i: loss for i, loss in uninterrupted.items() if i > resumed_after}


@pytest.mark.parametrize(
    "flags",
    ["", "--async-save", pytest.param("--async-save --use-persistent-ckpt-worker", marks=pytest.mark.matrix)],
)
def test_goes_on_after_kill_from_outside(tmp_path: Path, uninterrupted: dict[int, str], flags: str) -> None:
    command = f"{_command(tmp_path)} {flags}"
    program = Program(2, command)
    program.wait_for((tmp_path / "iter_0000004").exists)
    program.signal(signal.SIGKILL)
    program.wait()
    losses = losses_by_iteration(finished(command, ranks=2))
    assert min(losses) in (1, 3, 5)
    assert losses == {i: loss for i, loss in uninterrupted.items() if i >= min(losses)}


@pytest.mark.parametrize(
    ("trap", "flags"),
    [
        (interruptions.terminate_after_step, "--num-workers 1"),
        pytest.param(
            interruptions.terminate_all_after_step,
            "--async-save --use-persistent-ckpt-worker",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_sigterm_saves_first(
    tmp_path: Path, uninterrupted: dict[int, str], trap: Callable[[], None], flags: str
) -> None:
    command = f"{_command(tmp_path)} --save-interval 100 --exit-signal-handler {flags}"
    finished(command, ranks=2, prepare=trap)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    losses = losses_by_iteration(finished(command, ranks=2))
    assert losses == {i: loss for i, loss in uninterrupted.items() if i > 3}


def test_older_checkpoint_is_overwritten_as_a_whole(tmp_path: Path, uninterrupted: dict[int, str]) -> None:
    command = _command(tmp_path)
    finished(command, ranks=2)
    # Back to iteration 2, and killed while it writes over the checkpoint of iteration 4.
    shutil.rmtree(tmp_path / "iter_0000006")
    shutil.rmtree(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    _killed(f"{command} --ckpt-step 2", interruptions.kill_in_data_file)
    losses = losses_by_iteration(finished(command, ranks=2))
    assert losses == {i: loss for i, loss in uninterrupted.items() if i > 2}
