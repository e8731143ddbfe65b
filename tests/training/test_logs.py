"""What a run says: its log lines, TensorBoard, and Weights & Biases without an account."""

import re
from pathlib import Path

import pytest

from more_megatron.evaluation.training_log import read_log
from more_megatron.systems import systems
from tests.helpers.models import small_config
from tests.helpers.program import Ended, pretrain_more
from tests.helpers.training import TINY

_RUN = (
    f"{TINY} --split 80,10,10 --train-iters 3 --num-layers 2 --recurrence-steps 3 --eval-iters 1 "
    "--eval-interval 2 --wandb-project more --wandb-exp-name tiny"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Return the folder that a run logged to, and how the run ended."""
    folder = tmp_path_factory.mktemp("logs")
    flags = f"--tensorboard-dir {folder / 'tensorboard'} --wandb-save-dir {folder} --save {folder} --save-interval 9"
    [ended] = pretrain_more(1, f"{_RUN} {flags}", environment={"WANDB_MODE": "offline"})
    assert ended.code == 0, ended.stderr
    return folder, ended


def test_log_line_holds_loss_and_recurrence_steps(run: tuple[Path, Ended]) -> None:
    lines = [line for line in run[1].stdout.splitlines() if " iteration " in line and "lm loss:" in line]
    assert len(lines) == 3
    for line in lines:
        assert "recurrence steps: 3.000000E+00 |" in line
        assert "load_balancing_loss:" in line
        assert "z_loss:" in line


def test_evaluation_prints_loss_and_perplexity(run: tuple[Path, Ended]) -> None:
    lines = [line for line in run[1].stdout.splitlines() if "validation loss at iteration" in line]
    assert lines
    for line in lines:
        assert re.search(r"lm loss value: \d\.\d+E[+-]\d+ \| lm loss PPL: \d\.\d+E[+-]\d+", line)


def test_tensorboard_has_the_curves(run: tuple[Path, Ended]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("lm loss", "recurrence steps", "grad-norm", "lm loss validation", "lm loss test"):
        assert name in scalars
    # The last point of each is the last line of its kind.
    for split in ("validation", "test"):
        line = [line for line in run[1].stdout.splitlines() if line.startswith(f" {split} loss at iteration")][-1]
        value = float(line.split("lm loss value: ")[1].split(" ")[0])
        assert events.Scalars(f"lm loss {split}")[-1].value == pytest.approx(value, rel=1e-5)
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3]


def test_every_curve_is_explained(run: tuple[Path, Ended]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    explained = set(re.findall(r"`([^`]+)`", page))
    tags = [tag.removesuffix(" vs samples") for tag in events.Tags()["scalars"] if not tag.startswith("health/")]
    assert "router entropy/step 1" in tags
    assert [tag for tag in tags if re.sub(r"\d+$", "N", tag) not in explained] == []
    for system in systems().values():
        config = small_config(system.name)
        names = {*system.losses(config), *system.figures(config)}
        assert [name for name in names if re.sub(r"\d+$", "N", name) not in explained] == []


def test_wandb_keeps_the_run_offline(run: tuple[Path, Ended]) -> None:
    [folder] = (run[0] / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_validation_is_quoted_and_not_the_test(run: tuple[Path, Ended]) -> None:
    log = read_log(run[1].stdout.splitlines())
    assert [validation.iteration for validation in log.validations] == [2, 3]
    assert " test loss at iteration 3 on test set |" in run[1].stdout


def test_no_memory_of_a_plain_model_is_claimed(run: tuple[Path, Ended]) -> None:
    assert "heoretical memory" not in run[1].stdout
    assert "(after 2 iterations) memory (MB) | allocated" in run[1].stdout


def test_nothing_is_said_about_absent_packages(run: tuple[Path, Ended]) -> None:
    for name in ("Transformer Engine and Apex", "Apex is not installed", "one_logger package"):
        assert name not in run[1].stderr
        assert name not in run[1].stdout
