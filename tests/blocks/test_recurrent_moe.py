"""The iterated MoE sub-layer: what it equals, and where its gradients go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.training import training

from more_megatron.blocks import iterated_moe as recurrent_moe
from more_megatron.evaluation.runs import forget_run
from more_megatron.model.depth import Depth
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, History, train

_RUN = f"{TINY} --num-layers 2 --train-iters 3 --weight-decay 0"
_RECURRENT = f"{_RUN} --more-variant recurrent_moe"

Parameters = dict[str, torch.Tensor]


def _train_and_keep(command_lines: list[str]) -> list[tuple[History, Parameters, Parameters]]:
    """Return of each run what it reported, and its parameters before and after training."""
    return [_run(command_line) for command_line in command_lines]


def _run(command_line: str) -> tuple[History, Parameters, Parameters]:
    kept: dict[str, Any] = {}
    setup = training.setup_model_and_optimizer

    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        kept["model"] = result[0][0]
        kept["before"] = _parameters(kept["model"])
        return result

    training.setup_model_and_optimizer = setup_and_keep
    try:
        history = train(command_line)
        return history, kept["before"], _parameters(kept["model"])
    finally:
        training.setup_model_and_optimizer = setup
        forget_run()


def _parameters(model: torch.nn.Module) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _iterate_in_plain_autograd(
    step: Callable[..., Any], hidden_states: torch.Tensor, depth: Depth, see: Any
) -> torch.Tensor:
    """The truncated loop as it is defined: detach what the first steps add, nothing else."""
    carried = None
    for index in range(depth.steps):
        if index < depth.no_grad_steps:
            with torch.no_grad():
                after, carried = step(hidden_states, carried, index)
                increment = after - hidden_states
            hidden_states = hidden_states + increment.detach()
        else:
            hidden_states, carried = step(hidden_states, carried, index)
    return hidden_states


def _train_in_plain_autograd(command_line: str) -> list[tuple[History, Parameters, Parameters]]:
    recurrent_moe.iterate_residual = _iterate_in_plain_autograd
    return _train_and_keep([command_line])


def test_one_step_equals_moe_bit_for_bit() -> None:
    lines = [f"{_RUN} --more-variant moe", f"{_RECURRENT} --recurrence-steps 1"]
    (moe, _, moe_parameters), (recurrent, _, parameters) = run_ranks(1, _train_and_keep, lines)[0]
    assert recurrent.losses == moe.losses
    assert recurrent.grad_norms == moe.grad_norms
    assert parameters.keys() == moe_parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, moe_parameters[name]), name


def test_layers_below_keep_their_gradient() -> None:
    line = f"{_RECURRENT} --recurrence-steps 4 --recurrence-backprop-steps 1"
    [(_, before, after)] = run_ranks(1, _train_and_keep, [line])[0]
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    # An expert that no token chose in the last step has no gradient.
    assert [name for name in unmoved if "local_experts" not in name] == []


def test_truncated_gradient_equals_plain_autograd() -> None:
    line = f"{_RECURRENT} --recurrence-steps 4 --recurrence-backprop-steps 2"
    [(history, _, parameters)] = run_ranks(1, _train_and_keep, [line])[0]
    [(expected, _, expected_parameters)] = run_ranks(1, _train_in_plain_autograd, line)[0]
    assert history.losses == pytest.approx(expected.losses, rel=1e-6)
    assert history.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected_parameters[name], rtol=1e-4, atol=1e-5)


def test_truncation_changes_the_gradient_and_not_the_loss() -> None:
    lines = [f"{_RECURRENT} --recurrence-steps 4 --recurrence-backprop-steps {steps}" for steps in (1, 4)]
    (truncated, _, _), (whole, _, _) = run_ranks(1, _train_and_keep, lines)[0]
    assert truncated.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)
    assert truncated.grad_norms[0] != pytest.approx(whole.grad_norms[0], rel=1e-3)


@pytest.mark.parametrize(
    "loss", ["--moe-aux-loss-coeff 10 --moe-z-loss-coeff 0", "--moe-aux-loss-coeff 0 --moe-z-loss-coeff 10"]
)
def test_router_losses_are_averaged_over_gradient_steps(loss: str) -> None:
    # With scale 0 every step routes the same state: an average over steps is what one step gives, a sum is not.
    run = f"{_RECURRENT} --recurrence-residual-scale 0 --train-iters 1 {loss}"
    depths = ("--recurrence-steps 1", "--recurrence-steps 3", "--recurrence-steps 4 --recurrence-backprop-steps 2")
    lines = [f"{run} {depth}" for depth in depths]
    once, *repeated = [history for history, _, _ in run_ranks(1, _train_and_keep, lines)[0]]
    for history in repeated:
        assert history.grad_norms == pytest.approx(once.grad_norms, rel=1e-5)
