"""`huginn` against its mathematics in plain PyTorch, and what is its own: initial weights, biases, one norm twice."""

import math
from typing import Any

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import TokenGrid
from more_megatron.systems import get_system
from more_megatron.training.model import check_system
from tests.helpers.models import HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.plain import PlainModel, Weights
from tests.helpers.ranks import run_ranks

_HEADS, _LENGTH, _BATCH, _VOCABULARY = 4, 6, 2, 24
_SAMPLES = (3, 8)
_BASE, _EPSILON, _STD = 50000, 1e-6, 0.632
_HUGINN: dict[str, Any] = {
    "num_layers": 4,
    "layernorm_epsilon": _EPSILON,
    "rotary_interleaved": True,
    "add_qkv_bias": True,
    "recurrence_state_std": _STD,
}
_MODEL: dict[str, Any] = {"share_embeddings_and_output_weights": True, "rotary_base": _BASE}
_KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_moe_experts": None},
    "experts": {"moe_router_topk": 2},
    "add": {"num_moe_experts": None, "recurrence_injection": "add"},
    "none": {"num_moe_experts": None, "recurrence_injection": "none"},
}
_DEPTHS = (Depth(0, 1), Depth(0, 3), Depth(2, 2))


class _Reference(PlainModel):
    """The model as its authors' code computes it, with prelude and coda of one layer and a core of two.

    Args:
        weights: By the names in Megatron's model.
        injection: How the prelude's output enters a step.
    """

    def __init__(self, weights: Weights, injection: str) -> None:
        super().__init__(weights, _HEADS, rotary_base=_BASE, interleaved=True, epsilon=_EPSILON)
        self._injection = injection

    def logits(self, tokens: torch.Tensor, noise: torch.Tensor, depth: Depth) -> torch.Tensor:
        """Return logits, [b, s, vocabulary], for tokens, [b, s], and an initial state, [b, s, h]."""
        embedding = self.weights["embedding.word_embeddings.weight"]
        prelude = self._layer(0, embedding[tokens] * math.sqrt(HIDDEN))
        state = prelude if self._injection == "none" else noise
        for index in range(depth.steps):
            after = self._core(state, prelude)
            if index >= depth.no_grad_steps:
                state = after
            elif self._injection == "none":  # a stream: only its increments are constants
                state = state + (after - state).detach()
            else:
                state = after.detach()
        return self.norm(self._layer(3, self.norm(state, "final_layernorm")), "final_layernorm") @ embedding.T

    def _core(self, state: torch.Tensor, prelude: torch.Tensor) -> torch.Tensor:
        if self._injection == "linear":
            state = torch.cat((state, prelude), dim=-1) @ self.weights["decoder.loops.1.adapter"].T
        elif self._injection == "add":
            state = state + prelude
        return self._layer(2, self._layer(1, state))

    def _layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"layers.{number}"
        x = x + self.attention(f"{prefix}.self_attention", self.norm(x, f"{prefix}.input_layernorm"))
        x = self.norm(x, f"{prefix}.post_attention_norm")
        x = x + self.mlp(f"{prefix}.mlp", self.norm(x, f"{prefix}.pre_mlp_layernorm"))
        return self.norm(x, f"{prefix}.post_mlp_norm")


def _equals_its_mathematics(kind: str) -> None:
    start_ranks()
    config = small_config("huginn", **_HUGINN, **_KINDS[kind])
    tokens = torch.randint(_VOCABULARY, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(1))
    weigh = torch.randn(_BATCH, _LENGTH, _VOCABULARY, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(_LENGTH).expand(_BATCH, -1)
    for depth in _DEPTHS:
        micro_batch = MicroBatch(depth, _SAMPLES)
        model = gpt_model(config, _LENGTH, weight_std=0.2, **_MODEL)
        output = model(tokens, positions, None, extra_block_kwargs=micro_batch.block_kwargs())
        (output * weigh).mean().backward()
        weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
        grid = TokenGrid.of(torch.empty(_LENGTH, _BATCH, HIDDEN), micro_batch, config, model.decoder.tp_group)
        reference = _Reference(weights, config.recurrence_injection or "linear")
        expected = reference.logits(tokens, grid.noise(2, _STD).transpose(0, 1), depth)
        (expected * weigh).mean().backward()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            wanted = weights[name].grad
            if name.endswith("linear_qkv.bias"):
                wanted = wanted.view(_HEADS, 3, -1) * torch.tensor([1.0, 1.0, 0.0]).view(3, 1)
                wanted = wanted.flatten()
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6, msg=f"{depth}: {name}")


@pytest.mark.parametrize("kind", _KINDS)
def test_it_computes_what_its_authors_do(kind: str) -> None:
    run_ranks(1, _equals_its_mathematics, kind)


def _initial_weights() -> None:
    start_ranks()
    hidden, steps = 64, 8
    sizes = {"hidden_size": hidden, "ffn_hidden_size": 2 * hidden, "num_layers": 4, "recurrence_steps": steps}
    config = small_config("huginn", **{**_HUGINN, **sizes}, num_moe_experts=None)
    model = gpt_model(config, _LENGTH, **_MODEL)
    # The cut at three standard deviations leaves 0.9866 of the nominal one.
    inward = 0.9866 * math.sqrt(2 / (5 * hidden))
    outward = inward / math.sqrt(2 * (1 + 2 * steps + 1))
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[0].rpartition(".")[2]
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            std = outward if kind in ("linear_proj", "linear_fc2") else inward
            assert float(parameter.std()) == pytest.approx(std, rel=0.05), name
            assert float(parameter.abs().max()) <= 3 * std / 0.9866, name


def test_initial_weights_are_scaled_by_the_unrolled_depth() -> None:
    run_ranks(1, _initial_weights)


def test_prelude_and_coda_are_a_quarter_each() -> None:
    for layers, groups in ((1, [1]), (2, [2]), (3, [1, 1, 1]), (4, [1, 2, 1]), (8, [2, 4, 2]), (12, [3, 6, 3])):
        stack = get_system("huginn").stack(small_config("huginn", num_layers=layers))
        assert [len(group.layers) for group in stack.groups] == groups


def test_the_norm_that_stands_twice_must_lie_with_the_coda() -> None:
    layout = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, "num_layers": 6}
    division = {"recurrence_prelude_layers": 1, "recurrence_coda_layers": 4}
    with pytest.raises(MoREError, match=r"layers 3 to 6 as well.*--recurrence-coda-layers"):
        check_system(small_config("huginn", **layout, **division))


def test_a_state_that_is_not_random_has_no_deviation() -> None:
    flags = MoREFlags(recurrence_injection="none", recurrence_state_std=1.0)
    faults = list(get_system("huginn").without_effect(flags, {"recurrence_injection", "recurrence_state_std"}))
    assert faults == [
        "--recurrence-state-std has no effect while --recurrence-injection is none: leave one of them out"
    ]


def test_the_cost_of_huginn_0125() -> None:
    hidden, heads, width, vocabulary, length = 5280, 55, 17920, 65536, 4096
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": width, "num_layers": 8}
    config = small_config("huginn", **{**_HUGINN, **sizes}, num_moe_experts=None)
    system = get_system("huginn")
    cost = system.model_cost(config, length, vocabulary, tied=True)
    # Published: 3,564,976,800; a bias of values that stays zero is stored, too.
    assert cost.parameters == cost.active_parameters == 3_564_976_800 + 8 * hidden
    layer = 2 * (4 * hidden**2 + 3 * hidden * width) + 4 * hidden * length / 2
    adapter, head = 2 * hidden**2, 2 * hidden * vocabulary
    steps = 32
    assert cost.once + steps * cost.per_step == pytest.approx((steps + 1) * (4 * layer + adapter) + head)
    # A step without gradient has no backward pass, which costs as much as two forward passes.
    assert cost.training_flops(24, 8) == pytest.approx(
        (24 + 3 * 8) * (4 * layer + adapter) + 3 * (4 * layer + adapter + head)
    )
