"""Systems at equal cost: what is built is as wide as the formula says."""

from __future__ import annotations

import pytest

from more_megatron.evaluation.gpu_check.plan import DRY, command_line
from more_megatron.systems import names
from tests.helpers.ranks import run_ranks


@pytest.mark.matrix
def test_a_model_at_equal_cost_is_built_as_wide_as_it_was_matched() -> None:
    for name, (built, expected, operations) in run_ranks(1, matched, list(names()))[0].items():
        assert built == expected, name
        assert operations == pytest.approx(2.0, rel=0.05), name


def matched(systems: list[str]) -> dict[str, tuple[int, int, float]]:
    """Return parameters built, parameters by formula, and how many times the operations grew, for twice as many."""
    from more_megatron.evaluation.gpu_check.work.runs import configure, fresh_model
    from more_megatron.evaluation.step_benchmark import at_equal_cost, system_cost
    from more_megatron.model.depth import Depth

    found, depth = {}, Depth(0, 2)
    for name in systems:
        args, model_config = configure(command_line(name, DRY.speed, {"transformer-impl": "local"}))
        sizes = (args.padded_vocab_size, args.seq_length)
        before = system_cost(model_config.transformer, *sizes).training_flops(0, 2)
        model_config = at_equal_cost(model_config, 2 * before, depth, *sizes)
        cost = system_cost(model_config.transformer, *sizes)
        parameters = sum(parameter.numel() for parameter in fresh_model(model_config).parameters())
        found[name] = (parameters, cost.parameters, cost.training_flops(0, 2) / before)
    return found
