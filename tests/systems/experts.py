"""Runs the experts of a layer, and a plain function for one expert and one sequence at a time, on the same weights."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from more_megatron.blocks.layer import LayerInputs
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from tests.helpers.models import HIDDEN, gpt_model, small_config, start_ranks

_LENGTH, _BATCH, _EXPERTS = 12, 3, 6
_IDLE, _LONELY = 4, 2  # an expert without rows, and one with a single row
DEPTHS = (Depth(0, 1), Depth(0, 3), Depth(2, 2), Depth(4, 0))

Weights = dict[str, torch.Tensor]
# Rows of one sequence in one expert, [rows, h], in order of position, the expert's weights and the depth to [rows, h].
Expert = Callable[[torch.Tensor, Weights, Depth], torch.Tensor]


def feed_forward(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Return linear, GELU, linear."""
    linear = torch.nn.functional.linear
    inner = torch.nn.functional.gelu(linear(x, weights["ffn.fc1.weight"], weights["ffn.fc1.bias"]))
    return linear(inner, weights["ffn.fc2.weight"], weights["ffn.fc2.bias"])


def _routing(topk: int, generator: torch.Generator) -> torch.Tensor:
    """Return random weights of experts, [s * b, experts]."""
    scores = torch.rand(_LENGTH, _BATCH, _EXPERTS, generator=generator) + 0.1
    chosen = scores.clone()
    chosen[..., [_IDLE, _LONELY]] = 0.0
    chosen[7, 1, _LONELY] = 2.0
    routed = torch.zeros_like(scores).scatter(-1, chosen.topk(topk, dim=-1).indices, 1.0)
    return (scores * routed).flatten(0, 1)


def ours_and_reference(variant: str, reference: Expert, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return outputs and gradients by name, for each case: those of the layer's experts, and those of the reference.

    Args:
        variant: Name of the system.
        reference: Computes one expert.
        shapes: Shape of each weight of one expert, by name.
    """
    start_ranks()
    found = {}
    for depth, topk in itertools.product(DEPTHS, (1, 2)):
        config = small_config(variant, num_moe_experts=_EXPERTS, moe_router_topk=topk, moe_ffn_hidden_size=24)
        moe = gpt_model(config, _LENGTH, weight_std=0.3).decoder.layers[0].mlp
        generator = torch.Generator().manual_seed(topk)
        hidden = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=generator)
        probs = _routing(topk, generator)
        parameters = {name.removeprefix("experts."): p for name, p in moe.named_parameters() if "experts." in name}
        weights = {name: p.detach().view(_EXPERTS, *shapes[name]).requires_grad_() for name, p in parameters.items()}

        def ours(hidden: torch.Tensor, probs: torch.Tensor, moe: Any = moe, depth: Depth = depth) -> torch.Tensor:
            moe.route = lambda *_: (probs, probs != 0)
            return moe(hidden, LayerInputs(MicroBatch(depth)))[0]

        def slow(hidden: torch.Tensor, probs: torch.Tensor, w: Weights = weights, depth: Depth = depth) -> torch.Tensor:
            return _one_at_a_time(reference, hidden, probs, w, depth)

        found[f"{depth} top-{topk}"] = (
            _outcome(ours, hidden, probs, parameters),
            _outcome(slow, hidden, probs, weights),
        )
    return found


def _one_at_a_time(
    reference: Expert, hidden: torch.Tensor, probs: torch.Tensor, weights: Weights, depth: Depth
) -> torch.Tensor:
    output = torch.zeros_like(hidden)
    chosen = probs.view(_LENGTH, _BATCH, _EXPERTS)
    for sequence, expert in itertools.product(range(_BATCH), range(_EXPERTS)):
        positions = chosen[:, sequence, expert].nonzero().flatten()
        if len(positions) == 0:
            continue
        rows = reference(hidden[positions, sequence], {name: w[expert] for name, w in weights.items()}, depth)
        weighed = rows * chosen[positions, sequence, expert].unsqueeze(1)
        output = output.index_put((positions, torch.full_like(positions, sequence)), weighed, accumulate=True)
    return output


def _outcome(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    probs: torch.Tensor,
    weights: Weights,
) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of a random weighing of it."""
    hidden, chosen = hidden.clone().requires_grad_(), probs != 0
    probs = probs.clone().requires_grad_()
    output = compute(hidden, probs)
    weighing = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    leaves = {"hidden_states": hidden, "probs": probs, **weights}
    gradients = torch.autograd.grad((output * weighing).sum(), list(leaves.values()), allow_unused=True)
    named = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    # Where a token does not go, its weight is no input.
    return {"output": output.detach(), **named, "probs": named["probs"] * chosen}


def assert_equal(cases: dict[str, Any]) -> None:
    """Check outputs and gradients: 1e-5 of the largest entry."""
    for case, (ours, reference) in cases.items():
        assert set(ours) == set(reference)
        for name, expected in reference.items():
            scale = max(float(expected.abs().max()), 1.0)
            difference = float((ours[name].view_as(expected) - expected).abs().max())
            assert difference <= 1e-5 * scale, f"{case} {name}: {difference} at a scale of {scale}"
