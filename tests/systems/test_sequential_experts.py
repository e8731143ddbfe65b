"""Experts whose output a gated LSTM cell refines, against PyTorch's cell."""

import torch

from more_megatron.model.depth import Depth
from tests.helpers.models import HIDDEN
from tests.helpers.ranks import run_ranks
from tests.systems.experts import Weights, assert_equal, feed_forward, ours_and_reference

_WIDTH = 24
_SHAPES = {
    "ffn.fc1.weight": (_WIDTH, HIDDEN),
    "ffn.fc1.bias": (_WIDTH,),
    "ffn.fc2.weight": (HIDDEN, _WIDTH),
    "ffn.fc2.bias": (HIDDEN,),
    "lstm.weight": (4, HIDDEN, HIDDEN),
    "lstm.bias": (4, HIDDEN),
    "gate.weight": (1, HIDDEN),
    "gate.bias": (1,),
}


def _expert(x: torch.Tensor, weights: Weights, depth: Depth) -> torch.Tensor:
    # Input and hidden state are the same, so that only the sum of both matrices counts: here the second is zero.
    cell = {
        "weight_ih": weights["lstm.weight"].flatten(0, 1),
        "weight_hh": torch.zeros(4 * HIDDEN, HIDDEN),
        "bias_ih": weights["lstm.bias"].flatten(),
        "bias_hh": torch.zeros(4 * HIDDEN),
    }
    refined = feed_forward(x, weights)
    memory = torch.zeros_like(refined)
    for step in range(depth.steps):
        new, memory = torch.func.functional_call(torch.nn.LSTMCell(HIDDEN, HIDDEN), cell, (refined, (refined, memory)))
        gate = torch.sigmoid(torch.nn.functional.linear(refined, weights["gate.weight"], weights["gate.bias"]))
        after = gate * new + (1 - gate) * refined
        if step < depth.no_grad_steps:
            refined, memory = refined + (after - refined).detach(), memory.detach()
        else:
            refined = after
    return refined


def test_experts_equal_pytorchs_cell_one_at_a_time() -> None:
    (cases,) = run_ranks(1, ours_and_reference, "sequential_experts", _expert, _SHAPES)
    assert_equal(cases)
