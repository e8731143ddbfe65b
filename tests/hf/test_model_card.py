"""The README of an export quotes what was measured, by its name."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from more_megatron.hf.conversion.architecture import config_from_args
from more_megatron.hf.conversion.model_card import model_card
from more_megatron.systems import get_system, names
from tests.hf.conversion_sources import make_args


def _card(folder: Path, iteration: int) -> str:
    args = make_args(tensorboard_dir=str(folder))
    config = {**config_from_args(args), "dtype": "float32"}
    return model_card(config, args, iteration, 1000, has_tokenizer=True)


def test_validation_loss_is_not_that_of_the_test_split(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in ((5, 3.0), (10, 2.5), (20, 2.0)):
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("lm loss validation", loss + 0.25, step)
        # As runs of before wrote it, and as they do now.
        writer.add_scalar("lm loss validation", 9.0, 20)
        writer.add_scalar("lm loss test", 9.0, 20)
    card = _card(tmp_path, 20)
    assert "| training loss | 2.0000 nats a token (iteration 20) |" in card
    assert "| validation loss | 2.2500 nats a token (iteration 20) |" in card
    assert "9.0" not in card
    assert "| validation loss | 2.7500 nats a token (iteration 10) |" in _card(tmp_path, 15)


def test_losses_that_are_not_here_are_not_quoted(tmp_path: Path) -> None:
    card = _card(tmp_path / "absent", 20)
    assert "| training loss |" not in card
    assert "| validation loss |" not in card


@pytest.mark.parametrize("name", names())
def test_each_system_is_introduced(name: str) -> None:
    args = make_args(more_variant=name)
    config = {**config_from_args(args), "dtype": "float32"}
    card = model_card(config, args, 7, 1000, has_tokenizer=False)
    assert f"# MoRE `{name}`: {get_system(name).summary}" in card
    assert ("recurrence steps in evaluation" in card) == get_system(name).recurrent
