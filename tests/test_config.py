"""The configuration: what it completes, what it refuses, and how its fields become flags."""

from typing import Any

import pytest

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.flags import flag


def _config(**fields: Any) -> MoREConfig:
    return MoREConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recurrence_steps": 0}, "--recurrence-steps 0 must be at least 1"),
        ({"recurrence_backprop_steps": 0}, "--recurrence-backprop-steps 0 must be at least 1"),
        ({"recurrence_eval_steps": -1}, "--recurrence-eval-steps -1 must be at least 1"),
        (
            {"recurrence_sampling": "uniform", "recurrence_min_steps": 4, "recurrence_max_steps": 2},
            "--recurrence-max-steps 2 is below --recurrence-min-steps 4",
        ),
        (
            {
                "recurrence_sampling": "uniform",
                "recurrence_steps": 9,
                "recurrence_min_steps": 2,
                "recurrence_max_steps": 4,
            },
            "--recurrence-steps 9 lies outside",
        ),
        ({"recurrence_state_std": -0.1}, "--recurrence-state-std -0.1 must be at least 0"),
        ({"router_logit_ema": 1.0}, "--router-logit-ema 1 must be at least 0 and below 1"),
    ],
)
def test_refusals_name_the_flag(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MoREError) as refusal:
        _config(**fields)
    assert message in str(refusal.value)


def test_defaults() -> None:
    config = _config()
    assert (config.mean_steps, config.evaluation_steps) == (4, 4)
    assert _config(recurrence_steps=3).evaluation_steps == 3
    assert _config(recurrence_steps=3, recurrence_eval_steps=16).evaluation_steps == 16


def test_mean_and_range_complete_each_other() -> None:
    ranged = _config(recurrence_sampling="uniform", recurrence_min_steps=2, recurrence_max_steps=6)
    assert ranged.mean_steps == 4
    centred = _config(recurrence_sampling="uniform", recurrence_steps=4, recurrence_min_steps=2)
    assert centred.step_range(4) == (2, 6)
    assert _config(recurrence_steps=3).step_range(3) == (3, 3)


def test_flag_of_a_field() -> None:
    assert flag("recurrence_min_steps") == "--recurrence-min-steps"
