"""How many steps a micro-batch takes: the draw, its distribution, and settings that make no sense."""

from typing import Any

import numpy as np
import pytest

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth, DepthSampler
from tests.helpers.models import small_config

_DRAWS = 4000


def _config(**fields: Any) -> MoREConfig:
    fields = {name if name == "seed" else f"recurrence_{name}": value for name, value in fields.items()}
    return MoREConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **fields)


def _sampler(**fields: Any) -> DepthSampler:
    return DepthSampler(_config(**fields))


def _steps(sampler: DepthSampler, draws: int = _DRAWS) -> np.ndarray:
    return np.array([sampler.draw(step).steps for step in range(draws)])


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    fields = {"sampling": "poisson-lognormal", "steps": 8, "sampling_unit": "micro-batch"}
    places = [(step, micro_batch) for step in range(20) for micro_batch in range(4)]
    # A run that is resumed at each of these places.
    first = [_sampler(**fields).draw(*place) for place in places]
    sampler = _sampler(**fields)
    backwards = [sampler.draw(*place) for place in reversed(places)]
    assert backwards[::-1] == first
    other_seed = [_sampler(**fields, seed=7).draw(*place) for place in places]
    assert other_seed != first


def test_draws_stay_what_they_were() -> None:
    # A run that goes on with a newer version must meet the depths it would have met.
    uniform = _sampler(sampling="uniform", min_steps=1, max_steps=16)
    huginn = _sampler(sampling="poisson-lognormal", steps=8, sampling_unit="micro-batch", max_steps=64)
    assert [uniform.draw(step).steps for step in range(8)] == [6, 15, 16, 2, 8, 7, 3, 5]
    assert [huginn.draw(3, micro_batch).steps for micro_batch in range(8)] == [12, 13, 4, 13, 4, 6, 6, 15]


def test_a_step_has_one_depth_unless_each_micro_batch_draws_its_own() -> None:
    fields = {"sampling": "uniform", "min_steps": 1, "max_steps": 64}
    by_step, by_micro_batch = _sampler(**fields), _sampler(**fields, sampling_unit="micro-batch")
    for step in range(5):
        assert len({by_step.draw(step, index) for index in range(16)}) == 1
        assert len({by_micro_batch.draw(step, index) for index in range(16)}) > 4
    # One micro-batch a step: the two units are the same.
    assert [by_step.draw(step) for step in range(9)] == [by_micro_batch.draw(step) for step in range(9)]


def test_fixed_takes_the_number_given() -> None:
    assert set(_steps(_sampler(steps=5), 50)) == {5}
    assert set(_steps(_sampler(), 50)) == {4}


def test_uniform_reaches_every_number_between_its_ends_equally_often() -> None:
    steps = _steps(_sampler(sampling="uniform", min_steps=2, max_steps=6))
    numbers, counts = np.unique(steps, return_counts=True)
    assert numbers.tolist() == [2, 3, 4, 5, 6]
    # Five standard deviations of a binomial count.
    assert np.abs(counts - _DRAWS / 5).max() < 5 * np.sqrt(_DRAWS * 0.2 * 0.8)


def test_uniform_range_lies_around_the_mean() -> None:
    assert set(_steps(_sampler(sampling="uniform", steps=4), 500)) == set(range(1, 8))
    assert set(_steps(_sampler(sampling="uniform", steps=4, min_steps=3), 500)) == {3, 4, 5}


def test_poisson_lognormal_has_huginns_moments() -> None:
    mean, spread = 16, 0.5
    steps = _steps(_sampler(sampling="poisson-lognormal", steps=mean, max_steps=1000))
    # One plus a Poisson number whose rate is log-normal with the given mean.
    variance = mean + mean**2 * (np.exp(spread**2) - 1.0)
    assert steps.mean() == pytest.approx(mean + 1, abs=5 * np.sqrt(variance / _DRAWS))
    assert steps.var() == pytest.approx(variance, rel=0.2)
    assert steps.min() >= 1
    # Skewed as Huginn's: the median lies below the mean.
    assert np.median(steps) < steps.mean()


def test_poisson_lognormal_honours_its_ends() -> None:
    steps = _steps(_sampler(sampling="poisson-lognormal", steps=8, min_steps=3, max_steps=12))
    assert steps.min() == 3
    assert steps.max() == 12
    by_default = _steps(_sampler(sampling="poisson-lognormal", steps=2))
    assert by_default.max() == 8


def test_the_last_steps_carry_gradient() -> None:
    sampler = _sampler(sampling="uniform", min_steps=1, max_steps=8, backprop_steps=3)
    for step in range(100):
        depth = sampler.draw(step)
        assert depth.grad_steps == min(3, depth.steps)
        assert depth.no_grad_steps == depth.steps - depth.grad_steps
    assert _sampler(steps=5).draw(0) == Depth(0, 5)
    assert _sampler(steps=3, backprop_steps=2).draw(0) == Depth(1, 2)


def test_a_curriculum_moves_the_mean() -> None:
    sampler = _sampler(curriculum="0:1,10:2,20:6")
    assert [sampler.draw(step).steps for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 6, 6]
    uniform = _sampler(sampling="uniform", curriculum="0:1,1000:4", max_steps=6)
    assert {uniform.draw(step).steps for step in range(1000)} == {1}
    assert {uniform.draw(step).steps for step in range(1000, 2000)} == set(range(1, 7))
    huginn = _sampler(sampling="poisson-lognormal", curriculum="0:2,2000:8", max_steps=100)
    early, late = (np.mean([huginn.draw(start + i).steps for i in range(2000)]) for start in (0, 2000))
    assert early == pytest.approx(3.0, abs=0.3)
    assert late == pytest.approx(9.0, abs=0.6)


def test_the_expected_depth_is_that_of_the_mean() -> None:
    assert _sampler(sampling="uniform", steps=6, backprop_steps=4).expected() == Depth(2, 4)
    assert _sampler(steps=3, backprop_steps=4).expected() == Depth(0, 3)


def test_evaluation_takes_a_fixed_number_without_gradient() -> None:
    assert _sampler(sampling="uniform", steps=3).evaluation() == Depth(3, 0)
    assert _sampler(sampling="uniform", steps=3, eval_steps=16).evaluation() == Depth(16, 0)
    assert _sampler(curriculum="0:1,10:8").evaluation() == Depth(8, 0)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"eval_steps": 0}, ["--recurrence-eval-steps 0"]),
        ({"steps": 0}, ["--recurrence-steps 0"]),
        ({"steps": -3}, ["--recurrence-steps -3"]),
        ({"backprop_steps": 0}, ["--recurrence-backprop-steps 0"]),
        ({"min_steps": 0, "sampling": "uniform"}, ["--recurrence-min-steps 0"]),
        ({"max_steps": 0, "sampling": "uniform"}, ["--recurrence-max-steps 0"]),
        ({"ffn_hidden_size": 0}, ["--recurrence-ffn-hidden-size 0"]),
        ({"state_std": -0.1}, ["--recurrence-state-std -0.1"]),
        ({"min_steps": 4, "max_steps": 2}, ["--recurrence-max-steps 2", "--recurrence-min-steps 4"]),
        ({"sampling": "uniform", "steps": 9, "max_steps": 8}, ["--recurrence-steps 9", "--recurrence-max-steps 8"]),
        ({"sampling": "uniform", "steps": 2, "min_steps": 3}, ["--recurrence-steps 2", "--recurrence-min-steps 3"]),
        ({"sampling": "poisson-lognormal", "steps": 9, "max_steps": 8}, ["--recurrence-steps", "--recurrence-max"]),
        ({"curriculum": "0:1,20:2,10:3"}, ["--recurrence-curriculum", "out of order"]),
        ({"curriculum": "0:1,20:8", "max_steps": 4}, ["--recurrence-curriculum", "--recurrence-max-steps 4"]),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], flags: list[str]) -> None:
    with pytest.raises(MoREError) as refusal:
        _config(**fields)
    message = str(refusal.value)
    assert "\n" not in message
    for flag in flags:
        assert flag in message


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("router_logit_ema", 1.0, "--router-logit-ema 1 "),
        ("router_logit_ema", -0.1, "--router-logit-ema -0.1"),
        ("projection_dropout", 1.0, "--projection-dropout 1 "),
        ("router_min_entropy", -1.0, "--router-min-entropy -1 "),
        ("router_min_entropy_coeff", -1.0, "--router-min-entropy-coeff -1 "),
        ("projection_orthogonality_coeff", -1.0, "--projection-orthogonality-coeff -1 "),
    ],
)
def test_other_fields_have_their_ranges_too(field: str, value: float, flag: str) -> None:
    with pytest.raises(MoREError, match=flag):
        small_config("shared_block", **{field: value})
