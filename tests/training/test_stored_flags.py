"""What a resumed run takes from its checkpoint, what it warns of, and what it refuses."""

import argparse
import io
from pathlib import Path

import pytest
import torch

from more_megatron.pickles import read_metadata
from more_megatron.training.stored_flags import given_flags
from tests.helpers.program import finished, losses_by_iteration, pretrain_more, refused
from tests.helpers.training import TINY

_FIELDS = "--more-variant shared_block --recurrence-steps 3 --recurrence-state-std 0.5 --projection-dropout 0.1"
_MODEL = "--moe-router-topk 1 --norm-epsilon 0.001"
_RUN = f"{TINY} --num-layers 2 --train-iters 6"


def _run(flags: str) -> str:
    return finished(f"{_RUN} {flags}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of iteration 3."""
    folder = tmp_path_factory.mktemp("saved")
    _run(f"{_FIELDS} {_MODEL} --save {folder} --save-interval 3 --exit-interval 3")
    return folder


@pytest.fixture(scope="module")
def continued(saved: Path) -> dict[int, str]:
    """Return the losses of the run that repeats every flag."""
    return losses_by_iteration(_run(f"{_FIELDS} {_MODEL} --load {saved}"))


@pytest.mark.parametrize("flags", [_MODEL, "--use-checkpoint-args --norm-epsilon 0.001"])
def test_fields_left_out_come_from_the_checkpoint(saved: Path, continued: dict[int, str], flags: str) -> None:
    run = _RUN.replace("--vocab-size 127", "") if "--use-checkpoint-args" in flags else _RUN
    output = finished(f"{run} {flags} --load {saved}")
    assert losses_by_iteration(output) == continued
    for flag in ("--more-variant shared_block", "--recurrence-steps 3", "--recurrence-state-std 0.5"):
        assert f"> {flag}, as in {saved / 'iter_0000003'}" in output
    assert "WARNING: /" not in output


def test_other_flags_left_out_are_warned_of(saved: Path, continued: dict[int, str]) -> None:
    output = _run(f"--load {saved} --recurrence-steps 2")
    assert losses_by_iteration(output) != continued
    for change in (
        "--recurrence-steps was 3 and is 2 now",
        "--moe-router-topk was 1 and is 2 now",
        "--norm-epsilon was 0.001 and is 1e-05 now",
    ):
        assert f"WARNING: {saved / 'iter_0000003'}: {change}" in output


def test_named_system_that_is_another_is_refused(saved: Path) -> None:
    ended = pretrain_more(1, f"{_RUN} --load {saved} --more-variant recurrent_moe")[0]
    refused(ended, "--more-variant was shared_block and is recurrent_moe now")


def test_batch_size_moves_the_schedule(saved: Path) -> None:
    flags = "--global-batch-size 8 --lr-decay-style cosine --override-opt-param-scheduler"
    output = _run(f"{_MODEL} --load {saved} {flags}")
    assert "--global-batch-size was 4 and is 8 now, and the schedule counts samples" in output
    assert "WARNING: the learning rate goes from 1.000000E-03 in the checkpoint to 8.535534E-04" in output


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 2e-3",
        "--min-lr 1e-4",
        "--lr 5e-4 --min-lr 1e-4 --no-use-distributed-optimizer",
        "--lr 5e-4 --decoupled-lr 1e-4",
    ],
)
def test_another_learning_rate_keeps_the_moments(tmp_path: Path, flags: str) -> None:
    same = " ".join(flag for flag in ("--no-use-distributed-optimizer", "--decoupled-lr 1e-4") if flag in flags)
    run = f"--more-variant moe --save {tmp_path} --save-interval 3 {same}"
    _run(f"{run} --exit-interval 3")
    before = _moments(tmp_path / "iter_0000003")
    override = f"{flags} --override-opt-param-scheduler"
    refused(pretrain_more(1, f"{_RUN} {run} --load {tmp_path} {flags}")[0], "--override-opt-param-scheduler takes")
    output = _run(f"{run} --load {tmp_path} {override} --exit-interval 4")
    rate = float(flags.split()[1]) if flags.startswith("--lr") else 1e-3
    assert f"learning rate: {rate:.6E}" in output
    # A fourth step with the moments of three: they decay, and do not start from nothing.
    after = _moments(tmp_path / "iter_0000004")
    assert 0.5 < after / before < 2.0


def _moments(checkpoint: Path) -> float:
    metadata = read_metadata(checkpoint)
    total = 0.0
    for index, info in (metadata.storage_data or {}).items():
        if ".exp_avg." in index.fqn:
            with open(checkpoint / info.relative_path, "rb") as file:
                file.seek(info.offset)
                total += torch.load(io.BytesIO(file.read(info.length)), weights_only=True).abs().sum().item()
    assert total > 0
    return total


def test_tokenizer_of_another_size_is_refused(saved: Path) -> None:
    # Below some tokens of the data these are refused, and the checkpoint is not looked at.
    for size, former in ((60, "60"), (126, "126"), (200, "127")):
        ended = pretrain_more(1, f"{_RUN} {_MODEL} --load {saved} --vocab-size {size}")[0]
        refused(ended, former, str(size))


def test_given_flags() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=1)
    parser.add_argument("--list", action="append")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--absent", default="text")
    found = given_flags(parser, ["--number", "1", "--list", "a", "--switch"])
    assert found == {"number", "list", "switch"}
