"""Initial weights of recurrent blocks: as Takase et al. draw them, and the same however they are placed."""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from more_megatron.blocks.block_experts import LightExperts, ProjectionExperts
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.recurrent_block import RecurrentBlock
from more_megatron.model.initialization import BlockInitializer
from more_megatron.systems import get_system, names
from tests.helpers.models import EXPERTS, gpt_model, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_HIDDEN, _LAYERS, _STEPS = 64, 3, 5
# A normal distribution that is cut off at three standard deviations has this one.
_CUT = 0.98658
_LAYER_NUMBER = 2
_SIZES = {"hidden_size": _HIDDEN, "ffn_hidden_size": _HIDDEN, "moe_ffn_hidden_size": _HIDDEN}


@dataclass(frozen=True)
class _Group:
    """A process group as a placement sees it."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def _config(variant: str, **fields: Any) -> Any:
    sizes: dict[str, Any] = {**_SIZES, "num_layers": _LAYERS, "recurrence_steps": _STEPS, **fields}
    return small_config(variant, **sizes)


def _block(config: Any, groups: range, split: int = 1, rank: int = 0, layer: int = _LAYER_NUMBER) -> RecurrentBlock:
    block = RecurrentBlock(config, Placement(groups, EXPERTS, _Group(split, rank), 0), 2 * _HIDDEN, name="expert")
    block.initialize(layer)
    return block


def _draw_everything() -> None:
    start_ranks()
    _deviations_are_takases()
    _weights_do_not_depend_on_the_placement()
    _weights_differ_where_they_should()
    _projections_are_orthogonal()
    _whole_models_are_drawn_so()
    _one_can_refrain_from_drawing()


def test_initial_weights() -> None:
    run_ranks(1, _draw_everything)


def _deviations_are_takases() -> None:
    block = _block(_config("recurrent_experts"), range(EXPERTS))
    in_std = math.sqrt(2.0 / (5.0 * _HIDDEN))
    out_std = in_std / math.sqrt(2.0 * _LAYERS * _STEPS)
    expected = {"adapter": in_std, "qkv": in_std, "fc1": in_std, "proj": out_std, "fc2": out_std}
    for name, parameter in block.named_parameters():
        if name.startswith("norm"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        std = expected.pop(name)
        assert float(parameter.std()) == pytest.approx(_CUT * std, rel=0.02), name
        assert float(parameter.abs().max()) <= 3 * std
        assert abs(float(parameter.mean())) < 5 * std / math.sqrt(parameter.numel())
    assert not expected


def _weights_do_not_depend_on_the_placement() -> None:
    config = _config("recurrent_experts", num_query_groups=2)
    whole = _block(config, range(EXPERTS))
    for experts, split in ((1, 1), (2, 2), (4, 2)):
        for first in range(0, EXPERTS, experts):
            parts = [_block(config, range(first, first + experts), split, rank) for rank in range(split)]
            for name, parameter in whole.named_parameters():
                expected = parameter.view(EXPERTS, -1) if parameter.dim() == 1 else parameter
                expected = expected[first : first + experts].view(-1, *parameter.shape[1:])
                pieces = [part.get_parameter(name) for part in parts]
                is_split = pieces[0].tensor_model_parallel
                joined = torch.cat(pieces, dim=pieces[0].partition_dim) if is_split else pieces[0]
                assert torch.equal(joined, expected), (name, experts, split)


def _weights_differ_where_they_should() -> None:
    config = _config("recurrent_experts")
    block, other_layer = _block(config, range(EXPERTS)), _block(config, range(EXPERTS), layer=_LAYER_NUMBER + 1)
    other_seed = _block(_config("recurrent_experts", seed=4321), range(EXPERTS))
    for name in ("adapter", "qkv", "proj", "fc1", "fc2"):
        weight = block.get_parameter(name)
        assert not torch.equal(weight[0], weight[1])
        assert not torch.equal(weight, other_layer.get_parameter(name))
        assert not torch.equal(weight, other_seed.get_parameter(name))


def _projections_are_orthogonal() -> None:
    model = gpt_model(_config("shared_block"), seq_length=8)
    experts = model.decoder.layers[0].mlp.experts
    assert isinstance(experts, ProjectionExperts)
    for weights in (experts.proj_in, experts.proj_out):
        for weight in weights:
            torch.testing.assert_close(weight @ weight.T, torch.eye(_HIDDEN), rtol=0, atol=1e-5)
        assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(experts.proj_in, experts.proj_out)
    assert float(experts.orthogonality_penalty()) < 1e-10
    initializer = BlockInitializer(experts.config, 1)
    tall, wide = initializer.orthogonal((12, 5), "tall"), initializer.orthogonal((5, 12), "wide")
    torch.testing.assert_close(tall.T @ tall, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide @ wide.T, torch.eye(5), rtol=0, atol=1e-5)


def _whole_models_are_drawn_so() -> None:
    in_std = _CUT * math.sqrt(2.0 / (5.0 * _HIDDEN))
    out_std = in_std / math.sqrt(2.0 * _LAYERS * _STEPS)
    for layer in gpt_model(_config("shared_block_ffn"), seq_length=8).decoder.layers:
        experts, block = layer.mlp.experts, layer.mlp.recurrent_block
        assert isinstance(experts, LightExperts)
        for weight, std in (
            (experts.fc1, in_std),
            # Into the block, not the stream; top-1 of untrained softmax routers is one part in as many as there are.
            (experts.fc2, in_std * (EXPERTS if layer.config.moe_router_pre_softmax else 1)),
            (block.adapter, in_std),
            (block.attention.linear_qkv.weight, in_std),
            (block.attention.linear_proj.weight, out_std),
            (block.mlp.linear_fc1.weight, in_std),
            (block.mlp.linear_fc2.weight, out_std),
        ):
            assert float(weight.std()) == pytest.approx(std, rel=0.03)
        # What is not part of a recurrent block keeps Megatron's own initialization.
        assert float(layer.self_attention.linear_qkv.weight.std()) == pytest.approx(layer.config.init_method_std, 0.03)
    layers = gpt_model(_config("shared_block"), seq_length=8).decoder.layers
    assert float(layers[0].mlp.recurrent_block.proj.std()) == pytest.approx(out_std, rel=0.03)
    assert not torch.equal(layers[0].mlp.recurrent_block.proj, layers[1].mlp.recurrent_block.proj)


def _systems_that_read_a_deviation() -> dict[str, bool]:
    found = {}
    for name in names():
        weights = []
        for std in (0.02, 0.3):
            start_ranks()  # with the same random state
            config = small_config(name, init_method_std=std)
            model = gpt_model(config, seq_length=8, share_embeddings_and_output_weights=True)
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        found[name] = not torch.equal(*weights)
    return found


def test_a_system_refuses_the_deviation_that_it_does_not_read() -> None:
    (found,) = run_ranks(1, _systems_that_read_a_deviation)
    args = Namespace(untie_embeddings_and_output_weights=False)
    assert found == {name: "init_method_std" not in get_system(name).unread(args) for name in names()}
    system = get_system("huginn")
    faults = list(system.without_effect(system.flags(args), {"init_method_std"}))
    assert faults == ["--more-variant huginn never reads --init-method-std: leave it out"]


def _one_can_refrain_from_drawing() -> None:
    config = _config("recurrent_experts", perform_initialization=False)
    placement = Placement(range(2), 2, None, 0)
    block = RecurrentBlock(config, placement, 2 * _HIDDEN, name="expert")
    with torch.no_grad():
        block.adapter.fill_(7.0)
    block.initialize(1)
    assert float(block.adapter.min()) == 7.0
