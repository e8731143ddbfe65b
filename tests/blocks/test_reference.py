"""Grouped experts against a plain reference that computes one (sequence, expert) at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from more_megatron.blocks.layer import LayerInputs
from more_megatron.config import MoREConfig
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import state_noise
from tests.blocks.reference import LightExpert, ReferenceBlock, Shape
from tests.helpers.models import HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH, _EXPERTS, _WIDTH = 12, 3, 6, 24
_IDLE, _LONELY = 4, 2  # an expert without rows, and one with a single row
_LONELY_TOKEN = (1, 7)
_SAMPLES = (11, 5, 40)
# Routing top-k, query groups, training or evaluation.
_CASES = list(itertools.product((1, 2), (4, 2), (True, False)))


@dataclass
class Case:
    """A layer's MoE part, what goes into it, and how the tokens are routed."""

    config: MoREConfig  # model configuration
    model: GPTModel  # model whose only layer is tested
    hidden_states: torch.Tensor  # [s, b, h]
    probs: torch.Tensor  # weight of each expert for each token, [s * b, experts], zero where a token does not go
    depth: Depth  # recurrence steps
    samples: tuple[int, ...]  # sample ids; empty as in evaluation

    @property
    def moe(self) -> nn.Module:
        """The MoE part."""
        return self.model.decoder.layers[0].mlp

    @property
    def shape(self) -> Shape:
        """Sizes of the recurrent block."""
        return Shape(HIDDEN, self.config.num_attention_heads, self.config.num_query_groups, _WIDTH)

    def block(self) -> ReferenceBlock:
        """Return a reference block, its weights not yet set."""
        return ReferenceBlock(self.shape, self.config.layernorm_epsilon)

    def noise(self, sequence: int, positions: list[int]) -> torch.Tensor:
        """Return the initial states of tokens of a sequence, [tokens, h], each asked for by itself."""
        sample = torch.tensor([self.samples[sequence] if self.samples else 0])
        std = self.config.recurrence_state_std
        return torch.cat(
            [
                state_noise(sample, torch.tensor([place]), HIDDEN, seed=self.config.seed, layer=1, std=std)
                for place in positions
            ]
        )

    def meetings(self) -> Iterator[tuple[int, int, list[int], torch.Tensor]]:
        """Yield sequence, expert, and positions and weights of the tokens that meet there."""
        weights = self.probs.view(_LENGTH, _BATCH, _EXPERTS)
        for sequence, expert in itertools.product(range(_BATCH), range(_EXPERTS)):
            positions = weights[:, sequence, expert].nonzero().flatten().tolist()
            if positions:
                yield sequence, expert, positions, weights[positions, sequence, expert].unsqueeze(1)


def _cases(variant: str) -> Iterator[tuple[str, Case]]:
    start_ranks()
    for topk, groups, training in _CASES:
        config = small_config(
            variant,
            num_moe_experts=_EXPERTS,
            moe_router_topk=topk,
            num_query_groups=groups,
            recurrence_ffn_hidden_size=_WIDTH,
            recurrence_state_std=0.5,
        )
        model = gpt_model(config, _LENGTH, weight_std=0.25).train(training)
        generator = torch.Generator().manual_seed(topk)
        hidden = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=generator)
        depth, samples = (Depth(2, 2), _SAMPLES) if training else (Depth(0, 3), ())
        name = f"top-{topk}, {groups} query groups, training {training}"
        yield name, Case(config, model, hidden, _routing(topk, generator), depth, samples)


def _routing(topk: int, generator: torch.Generator) -> torch.Tensor:
    """Return random weights, [s * b, experts]."""
    scores = torch.rand(_LENGTH, _BATCH, _EXPERTS, generator=generator) + 0.1
    chosen = scores.clone()
    chosen[..., [_IDLE, _LONELY]] = 0.0
    position, sequence = _LONELY_TOKEN[1], _LONELY_TOKEN[0]
    chosen[position, sequence, _LONELY] = 2.0
    routed = torch.zeros_like(scores).scatter(-1, chosen.topk(topk, dim=-1).indices, 1.0)
    return (scores * routed).flatten(0, 1)


@dataclass
class Outcome:
    """Output and gradients by name of a computation."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, case: Case, compute: Callable[[Case], torch.Tensor]) -> Outcome:
        """Compute, and take the gradient of a random weighing of the output."""
        case.hidden_states = case.hidden_states.detach().requires_grad_()
        case.probs = case.probs.detach().requires_grad_()
        output = compute(case)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        (output * weights).sum().backward()
        # Where a token does not go, its weight is no input.
        probs = case.probs.grad * (case.probs != 0)
        return cls({"output": output.detach(), "hidden_states": case.hidden_states.grad, "probs": probs})


def _ours(case: Case) -> Outcome:
    moe = case.moe
    case.model.zero_grad()
    inputs = LayerInputs(MicroBatch(case.depth, case.samples), rotary_pos_emb=case.model.rotary_pos_emb(_LENGTH))

    def compute(case: Case) -> torch.Tensor:
        moe.route = lambda *_: (case.probs, case.probs != 0)
        return moe(case.hidden_states, inputs)[0]

    outcome = Outcome.of(case, compute)
    for name, parameter in moe.named_parameters():
        if not name.startswith("router"):
            outcome.tensors[name] = parameter.grad.clone()
    return outcome


def _load(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_parameter(name).copy_(weight)


def _unpacked(shape: Shape, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a block's weights under the names of the reference: for each group its queries, then key and value."""
    per_group = shape.heads // shape.groups + 2
    qkv = weights["qkv"].reshape(shape.groups, per_group, shape.head_dim, shape.hidden)
    return {
        "adapter.weight": weights["adapter"],
        "query.weight": qkv[:, :-2].reshape(shape.hidden, shape.hidden),
        "key.weight": qkv[:, -2].reshape(-1, shape.hidden),
        "value.weight": qkv[:, -1].reshape(-1, shape.hidden),
        "proj.weight": weights["proj"],
        "gate.weight": weights["fc1"][0],
        "up.weight": weights["fc1"][1],
        "down.weight": weights["fc2"],
        **{f"norms.{index}.weight": weights[f"norm_{index + 1}"] for index in range(4)},
    }


def _of_group(block: nn.Module, group: int) -> dict[str, torch.Tensor]:
    return {
        name: parameter.view(-1, HIDDEN)[group] if name.startswith("norm") else parameter[group]
        for name, parameter in block.named_parameters()
    }


def _packed_gradients(blocks: list[ReferenceBlock], prefix: str) -> dict[str, torch.Tensor]:
    groups = [block.packed(gradients=True) for block in blocks]
    return {
        f"{prefix}{name}": torch.cat([g[name] for g in groups])
        if name.startswith("norm")
        else torch.stack([g[name] for g in groups])
        for name in groups[0]
    }


def _with_zero_gradients(module: nn.Module) -> nn.Module:
    """Return the module with gradients of zero, which stay where nothing reaches it."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return module


def _recurrent_experts(case: Case) -> Outcome:
    blocks = [_with_zero_gradients(case.block()) for _ in range(_EXPERTS)]
    for expert, block in enumerate(blocks):
        _load(block, _unpacked(case.shape, _of_group(case.moe.experts.block, expert)))

    def compute(case: Case) -> torch.Tensor:
        output = torch.zeros_like(case.hidden_states)
        for sequence, expert, positions, weights in case.meetings():
            rows, depth = case.hidden_states[positions, sequence], case.depth
            state = case.noise(sequence, positions)
            last = blocks[expert](rows, state, positions, depth.no_grad_steps, depth.grad_steps)
            output = output.index_put(_places(positions, sequence), last * weights, accumulate=True)
        return output

    outcome = Outcome.of(case, compute)
    outcome.tensors |= _packed_gradients(blocks, "experts.block.")
    return outcome


def _shared_block(case: Case) -> Outcome:
    block = _with_zero_gradients(case.block())
    _load(block, _unpacked(case.shape, _of_group(case.moe.recurrent_block, 0)))
    projections = {name: _linears(getattr(case.moe.experts, name)) for name in ("proj_in", "proj_out")}

    def compute(case: Case) -> torch.Tensor:
        output = torch.zeros_like(case.hidden_states)
        for sequence, expert, positions, weights in case.meetings():
            rows, depth = projections["proj_in"][expert](case.hidden_states[positions, sequence]), case.depth
            state = case.noise(sequence, positions)
            last = block(rows, state, positions, depth.no_grad_steps, depth.grad_steps)
            result = projections["proj_out"][expert](last) * weights
            output = output.index_put(_places(positions, sequence), result, accumulate=True)
        return output

    outcome = Outcome.of(case, compute)
    outcome.tensors |= _packed_gradients([block], "recurrent_block.")
    for name, linears in projections.items():
        outcome.tensors[f"experts.{name}"] = torch.stack([linear.weight.grad for linear in linears])
    return outcome


def _shared_block_ffn(case: Case) -> Outcome:
    theirs, block = case.moe.recurrent_block, _with_zero_gradients(case.block())
    attention, mlp = theirs.attention, theirs.mlp
    fc1 = mlp.linear_fc1.weight.view(2, _WIDTH, HIDDEN)
    norms = {f"norm_{number}": getattr(theirs, f"norm_{number}").weight for number in range(1, 5)}
    weights = {"adapter": theirs.adapter, "qkv": attention.linear_qkv.weight, "proj": attention.linear_proj.weight}
    weights |= {"fc1": fc1, "fc2": mlp.linear_fc2.weight, **norms}
    _load(block, _unpacked(case.shape, weights))
    experts = [_with_zero_gradients(LightExpert(HIDDEN)) for _ in range(_EXPERTS)]
    for expert, light in enumerate(experts):
        _load(light, {"inner.weight": case.moe.experts.fc1[expert], "outer.weight": case.moe.experts.fc2[expert]})

    def compute(case: Case) -> torch.Tensor:
        combined = torch.zeros_like(case.hidden_states)
        for sequence, expert, positions, weights in case.meetings():
            result = experts[expert](case.hidden_states[positions, sequence]) * weights
            combined = combined.index_put(_places(positions, sequence), result, accumulate=True)
        everywhere, depth = list(range(_LENGTH)), case.depth
        return torch.stack(
            [
                block(
                    combined[:, sequence],
                    case.noise(sequence, everywhere),
                    everywhere,
                    depth.no_grad_steps,
                    depth.grad_steps,
                )
                for sequence in range(_BATCH)
            ],
            dim=1,
        )

    outcome = Outcome.of(case, compute)
    gradients = block.packed(gradients=True)
    prefix = "recurrent_block."
    outcome.tensors |= {
        f"{prefix}adapter": gradients["adapter"],
        f"{prefix}attention.linear_qkv.weight": gradients["qkv"],
        f"{prefix}attention.linear_proj.weight": gradients["proj"],
        f"{prefix}mlp.linear_fc1.weight": gradients["fc1"].flatten(0, 1),
        f"{prefix}mlp.linear_fc2.weight": gradients["fc2"],
        **{f"{prefix}norm_{number}.weight": gradients[f"norm_{number}"] for number in range(1, 5)},
        "experts.fc1": torch.stack([light.inner.weight.grad for light in experts]),
        "experts.fc2": torch.stack([light.outer.weight.grad for light in experts]),
    }
    return outcome


def _places(positions: list[int], sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(positions), torch.full((len(positions),), sequence)


def _linears(weights: torch.Tensor) -> list[nn.Linear]:
    linears = []
    for weight in weights:
        linear = nn.Linear(weight.size(1), weight.size(0), bias=False)
        _load(linear, {"weight": weight})
        linears.append(_with_zero_gradients(linear))
    return linears


_REFERENCES = {
    "recurrent_experts": _recurrent_experts,
    "shared_block": _shared_block,
    "shared_block_ffn": _shared_block_ffn,
}


def _both(variant: str) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    return {name: (_ours(case).tensors, _REFERENCES[variant](case).tensors) for name, case in _cases(variant)}


@pytest.mark.parametrize("variant", _REFERENCES)
def test_grouped_experts_equal_one_expert_and_sequence_at_a_time(variant: str) -> None:
    (cases,) = run_ranks(1, _both, variant)
    assert len(cases) == len(_CASES)
    for case, (ours, reference) in cases.items():
        assert set(ours) == set(reference), case
        for name, expected in reference.items():
            # Gradients are sums of many terms: 1e-5 of the largest entry, as for the output.
            scale = max(float(expected.abs().max()), 1.0)
            difference = float((ours[name] - expected).abs().max())
            assert difference <= 1e-5 * scale, f"{variant} {case} {name}: {difference} at a scale of {scale}"


def test_the_routing_of_these_tests_has_an_idle_expert_and_a_lonely_row() -> None:
    for topk in (1, 2):
        load = (_routing(topk, torch.Generator().manual_seed(topk)) != 0).sum(0)
        assert load[_IDLE] == 0
        assert load[_LONELY] == 1
        assert load.sum() == topk * _LENGTH * _BATCH
