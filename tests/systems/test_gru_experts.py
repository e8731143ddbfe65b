"""Experts that iterate a GRU in their inner layer, against PyTorch's cell."""

from typing import Any

import torch

from more_megatron.model.depth import Depth
from tests.helpers.models import HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.ranks import run_ranks
from tests.systems.experts import Weights, assert_equal, ours_and_reference

_WIDTH = 24
_SHAPES = {
    "ffn.fc1.weight": (_WIDTH, HIDDEN),
    "ffn.fc1.bias": (_WIDTH,),
    "gru.weight": (4, _WIDTH, _WIDTH),
    "gru.bias": (4, _WIDTH),
    "ffn.fc2.weight": (HIDDEN, _WIDTH),
    "ffn.fc2.bias": (HIDDEN,),
}


def _expert(x: torch.Tensor, weights: Weights, depth: Depth) -> torch.Tensor:
    linear = torch.nn.functional.linear
    # Of the reset and the update gate only the sum of both matrices counts: here the second is zero.
    of_input, of_state = weights["gru.weight"][:3], torch.zeros(3, _WIDTH, _WIDTH)
    bias_of_input, bias_of_state = weights["gru.bias"][:3], torch.zeros(3, _WIDTH)
    cell = {
        "weight_ih": of_input.flatten(0, 1),
        "weight_hh": torch.cat((of_state[:2], weights["gru.weight"][3:])).flatten(0, 1),
        "bias_ih": bias_of_input.flatten(),
        "bias_hh": torch.cat((bias_of_state[:2], weights["gru.bias"][3:])).flatten(),
    }
    state = torch.nn.functional.gelu(linear(x, weights["ffn.fc1.weight"], weights["ffn.fc1.bias"]))
    for step in range(depth.steps):
        after = torch.func.functional_call(torch.nn.GRUCell(_WIDTH, _WIDTH), cell, (state, state))
        state = state + (after - state).detach() if step < depth.no_grad_steps else after
    return linear(state, weights["ffn.fc2.weight"], weights["ffn.fc2.bias"])


def test_experts_equal_pytorchs_cell_one_at_a_time() -> None:
    (cases,) = run_ranks(1, ours_and_reference, "gru_experts", _expert, _SHAPES)
    assert_equal(cases)


def _initial_weights() -> dict[str, Any]:
    start_ranks()
    config = small_config("gru_experts", moe_ffn_hidden_size=256)
    experts = gpt_model(config, 8).decoder.layers[0].mlp.experts
    return {name: parameter.detach() for name, parameter in experts.named_parameters()}


def test_initial_weights_are_those_of_pytorchs_cell() -> None:
    (weights,) = run_ranks(1, _initial_weights)
    bound = 1 / 16
    # A uniform number has the variance bound^2 / 3, the sum of two twice that.
    for name, gates in (("gru.weight", weights["gru.weight"]), ("gru.bias", weights["gru.bias"].view(4, 4, 256))):
        assert gates[:, 2:].abs().max() <= bound, name
        assert bound < gates[:, :2].abs().max() <= 2 * bound, name
        torch.testing.assert_close(gates[:, 2:].var(), torch.tensor(bound**2 / 3), rtol=0.1, atol=0)
        torch.testing.assert_close(gates[:, :2].var(), torch.tensor(2 * bound**2 / 3), rtol=0.1, atol=0)
    for name in ("ffn.fc1.bias", "ffn.fc2.bias"):
        assert not weights[name].any()
    assert 0.015 < weights["ffn.fc1.weight"].std() < 0.021
