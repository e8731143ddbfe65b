"""`loop` against its mathematics in plain PyTorch, and how it divides a model."""

from typing import Any

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.systems import get_system
from more_megatron.training.model import check_system
from tests.helpers.models import gpt_model, small_config, start_ranks
from tests.helpers.plain import PlainModel, Weights
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH, _VOCABULARY = 6, 2, 24
_DEPTHS = (Depth(0, 1), Depth(0, 3), Depth(2, 2))
_DENSE: dict[str, Any] = {"num_layers": 4, "num_moe_experts": None}
_AROUND = {"recurrence_prelude_layers": 1, "recurrence_coda_layers": 1}
_KINDS: dict[str, dict[str, Any]] = {
    "whole": _DENSE,
    "in place": _DENSE | {"recurrence_group_layers": 1},
    "experts": {"num_layers": 4, "moe_router_topk": 2, "recurrence_group_layers": 2},
    "core": _DENSE | _AROUND,
    "core, add": _DENSE | _AROUND | {"recurrence_injection": "add"},
    "core, linear": _DENSE | _AROUND | {"recurrence_injection": "linear"},
}


class _Reference(PlainModel):
    """Layers with their norms in front, groups of which are repeated."""

    def __init__(self, weights: Weights, groups: list[tuple[range, bool]], injection: str) -> None:
        super().__init__(weights, 4, rotary_base=10000, interleaved=False, epsilon=1e-5)
        self._groups, self._injection = groups, injection

    def logits(self, tokens: torch.Tensor, depth: Depth) -> torch.Tensor:
        """Return logits, [b, s, vocabulary], for tokens, [b, s]."""
        state = self.weights["embedding.word_embeddings.weight"][tokens]
        for number, (layers, is_repeated) in enumerate(self._groups):
            state = self._repeat(number, layers, state, depth) if is_repeated else self._run(layers, state)
        return self.norm(state, "final_layernorm") @ self.weights["output_layer.weight"].T

    def _repeat(self, number: int, layers: range, inputs: torch.Tensor, depth: Depth) -> torch.Tensor:
        state = inputs
        for index in range(depth.steps):
            entry = state
            if self._injection == "linear":
                entry = torch.cat((state, inputs), dim=-1) @ self.weights[f"decoder.loops.{number}.adapter"].T
            elif self._injection == "add" and index > 0:
                entry = state + inputs
            after = self._run(layers, entry)
            if index >= depth.no_grad_steps:
                state = after
            else:  # a stream keeps its gradient, what forgets its past does not
                state = after.detach() if self._injection == "linear" else state + (after - state).detach()
        return state

    def _run(self, layers: range, x: torch.Tensor) -> torch.Tensor:
        for number in layers:
            name = f"layers.{number}"
            x = x + self.attention(f"{name}.self_attention", self.norm(x, f"{name}.input_layernorm"))
            x = x + self.mlp(f"{name}.mlp", self.norm(x, f"{name}.pre_mlp_layernorm"))
        return x


def _equals_its_mathematics(kind: str) -> None:
    start_ranks()
    config = small_config("loop", **_KINDS[kind])
    groups = [(layers, group.loop is not None) for group, layers in get_system("loop").stack(config).places()]
    tokens = torch.randint(_VOCABULARY, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(1))
    weigh = torch.randn(_BATCH, _LENGTH, _VOCABULARY, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(_LENGTH).expand(_BATCH, -1)
    for depth in _DEPTHS:
        model = gpt_model(config, _LENGTH, weight_std=0.2)
        output = model(tokens, positions, None, extra_block_kwargs=MicroBatch(depth, (3, 8)).block_kwargs())
        (output * weigh).mean().backward()
        weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
        expected = _Reference(weights, groups, config.recurrence_injection or "none").logits(tokens, depth)
        (expected * weigh).mean().backward()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, weights[name].grad, rtol=1e-5, atol=1e-6, msg=f"{kind}, {depth}: {name}"
            )


@pytest.mark.parametrize("kind", _KINDS)
def test_it_computes_repeated_layers(kind: str) -> None:
    run_ranks(1, _equals_its_mathematics, kind)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(8, True)]),
        ({"recurrence_group_layers": 2}, [(2, True)] * 4),
        ({"recurrence_prelude_layers": 2}, [(2, False), (6, True)]),
        (
            {"recurrence_prelude_layers": 1, "recurrence_coda_layers": 1, "recurrence_group_layers": 3},
            [(1, False), (3, True), (3, True), (1, False)],
        ),
    ],
)
def test_a_model_is_divided_as_the_flags_say(fields: dict[str, int], expected: list[tuple[int, bool]]) -> None:
    stack = get_system("loop").stack(small_config("loop", num_layers=8, **fields))
    assert [(len(group.layers), group.loop is not None) for group in stack.groups] == expected


_PP2 = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recurrence_prelude_layers": 2, "recurrence_coda_layers": 2}, "no layer to repeat.*--num-layers 4"),
        ({"recurrence_prelude_layers": -1}, "--recurrence-prelude-layers -1.*at least 0"),
        ({"recurrence_group_layers": 0}, "--recurrence-group-layers 0.*at least 1"),
        ({"recurrence_group_layers": 3}, "--recurrence-group-layers 3 does not divide"),
        (_PP2, r"layers 1 to 4.*stages of \[2, 2\] layers cut.*--pipeline-model-parallel-layout.*smaller groups"),
        (_PP2 | _AROUND, "layers 2 to 3"),
        ({"num_moe_experts": None, "router_logit_ema": 0.5}, "--num-experts.*--router-logit-ema"),
        ({"num_moe_experts": None, "router_min_entropy": 0.5}, "--num-experts.*--router-min-entropy"),
        (
            {
                "moe_router_load_balancing_type": "global_aux_loss",
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            "global_aux_loss.*--recompute-granularity selective",
        ),
        (
            {
                "recurrence_sampling": "uniform",
                "recurrence_min_steps": 2,
                "overlap_grad_reduce": True,
                "recompute_granularity": "selective",
                "recompute_modules": ["mlp"],
            },
            "--recompute-modules mlp.*--recompute-granularity full",
        ),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
    ],
)
def test_what_cannot_be_repeated_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MoREError, match=message) as refusal:
        check_system(small_config("loop", **{"num_layers": 4, **fields}))
    assert "\n" not in str(refusal.value)


def test_groups_that_no_stage_cuts_are_accepted() -> None:
    for fields in ({"recurrence_group_layers": 2}, {"recurrence_group_layers": 1}):
        check_system(small_config("loop", num_layers=4, **_PP2, **fields))
    uneven = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
    check_system(small_config("loop", num_layers=4, **_PP2, **_AROUND, **uneven))


def test_the_cost_of_a_loop_counts_passes() -> None:
    """Against Megatron's plain layers: those of a group cost as many times as they are passed."""
    for experts in (None, 4):
        fields = {"num_layers": 4, "num_moe_experts": experts}
        config = small_config("loop", **fields, **_AROUND)
        looped, plain = get_system("loop").cost(config, 8), get_system("moe").cost(small_config("moe", **fields), 8)
        layer = plain.once / 4
        assert (looped.parameters, looped.active_parameters) == (plain.parameters, plain.active_parameters)
        assert looped.once + 5 * looped.per_step == pytest.approx((1 + 5 * 2 + 1) * layer)
        assert looped.training_flops(3, 2) == pytest.approx(3 * 2 * layer + (3 + 3 * 2) * 2 * layer)


def _parameters() -> None:
    """Compare the parameters that the formulas count with those that are built."""
    start_ranks()
    for system in (get_system("loop"), get_system("huginn")):
        for fields in _KINDS.values():
            kept = {name: value for name, value in fields.items() if system.name == "loop" or "group" not in name}
            config = small_config(system.name, **kept, moe_shared_expert_intermediate_size=24)
            built = sum(parameter.numel() for parameter in gpt_model(config, _LENGTH).parameters())
            cost = system.model_cost(config, _LENGTH, _VOCABULARY, tied=False)
            assert cost.parameters == built


def test_all_parameters_are_counted() -> None:
    run_ranks(1, _parameters)
