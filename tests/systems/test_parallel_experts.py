"""Experts that mix a feed-forward network and an LSTM along the tokens sent to them, against PyTorch's LSTM."""

import pytest
import torch

from more_megatron.flags import MoREFlags
from more_megatron.model.depth import Depth
from more_megatron.systems import get_system
from tests.helpers.models import HIDDEN
from tests.helpers.ranks import run_ranks
from tests.systems.experts import Weights, assert_equal, feed_forward, ours_and_reference

_WIDTH, _GATE = 24, 64
_SHAPES = {
    "ffn.fc1.weight": (_WIDTH, HIDDEN),
    "ffn.fc1.bias": (_WIDTH,),
    "ffn.fc2.weight": (HIDDEN, _WIDTH),
    "ffn.fc2.bias": (HIDDEN,),
    "lstm.input.weight": (4, HIDDEN, HIDDEN),
    "lstm.input.bias": (4, HIDDEN),
    "lstm.state": (4, HIDDEN, HIDDEN),
    "gate.inner.weight": (_GATE, HIDDEN),
    "gate.inner.bias": (_GATE,),
    "gate.weight": (2, _GATE),
    "gate.bias": (2,),
}


def _expert(x: torch.Tensor, weights: Weights, depth: Depth) -> torch.Tensor:
    linear = torch.nn.functional.linear
    lstm = {
        "weight_ih_l0": weights["lstm.input.weight"].flatten(0, 1),
        "weight_hh_l0": weights["lstm.state"].flatten(0, 1),
        "bias_ih_l0": weights["lstm.input.bias"].flatten(),
        "bias_hh_l0": torch.zeros(4 * HIDDEN),
    }
    along = torch.func.functional_call(torch.nn.LSTM(HIDDEN, HIDDEN), lstm, (x,))[0]
    inner = torch.relu(linear(x, weights["gate.inner.weight"], weights["gate.inner.bias"]))
    mix = torch.softmax(linear(inner, weights["gate.weight"], weights["gate.bias"]), dim=-1)
    return mix[:, :1] * feed_forward(x, weights) + mix[:, 1:] * along


def test_experts_equal_pytorchs_lstm_one_segment_at_a_time() -> None:
    (cases,) = run_ranks(1, ours_and_reference, "parallel_experts", _expert, _SHAPES)
    assert_equal(cases)


@pytest.mark.parametrize("name", ["recurrence_steps", "recurrence_sampling", "recurrence_state_std"])
def test_flags_of_depth_are_refused_by_name(name: str) -> None:
    (fault,) = get_system("parallel_experts").without_effect(MoREFlags(), {name})
    assert fault == f"--more-variant parallel_experts never reads --{name.replace('_', '-')}: leave it out"
