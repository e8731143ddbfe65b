"""What a call says of its recurrences: the state behind each step, and router logits by layer and step."""

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system
from tests.hf.reference_models import LENGTH, SYSTEMS, random_model, tokens

_STEPS = 3
_RECURRENT = [name for name in SYSTEMS if find_system(name).recurrent]
_LOOPED = [name for name in _RECURRENT if any(g.loop for g in find_system(name).groups(random_model(name).config))]


def _states(model: MoREForCausalLM, **kwargs: Any) -> torch.Tensor:
    return model(tokens(), **{"num_steps": _STEPS, "output_recurrent_states": True, **kwargs}).recurrent_states


@pytest.mark.parametrize("name", _RECURRENT)
@torch.no_grad()
def test_states_of_fewer_steps_begin_those_of_more(name: str) -> None:
    model = random_model(name)
    states = _states(model)
    assert states.shape[1:4] == (_STEPS, *tokens().shape)
    for steps in range(1, _STEPS):
        torch.testing.assert_close(_states(model, num_steps=steps)[0], states[0, :steps], atol=1e-6, rtol=0)
    assert (states[:, 1:] - states[:, :-1]).abs().amax(dim=(2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("name", _LOOPED)
@torch.no_grad()
def test_states_of_loops_are_what_their_last_layers_return(name: str) -> None:
    model, seen = random_model(name), {}
    groups = [group for group in find_system(name).groups(model.config) if group.loop is not None]
    for group in groups:
        passes = seen.setdefault(group.layers[-1], [])
        model.model.layers[group.layers[-1]].register_forward_hook(lambda *call, to=passes: to.append(call[2][0]))
    assert torch.equal(_states(model), torch.stack([torch.stack(passes) for passes in seen.values()]))


def _block(block: Any, x: torch.Tensor, state: torch.Tensor, rows: Any) -> list[torch.Tensor]:
    """Return the states of a block whose rows are the tokens in their order, with attention written out."""
    config = block.config
    x, state = (part.view(*tokens().shape, -1) for part in (x, state))
    weight, states = dict(block.named_parameters()), []

    def norm(x: torch.Tensor, number: int) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight[f"norm_{number}"].flatten(), config.norm_eps)

    for _ in range(_STEPS):
        u = torch.cat((state, x), dim=-1) @ weight["adapter"].view(x.size(-1), -1).T
        qkv = norm(u, 1) @ weight["qkv"].view(-1, x.size(-1)).T
        qkv = qkv.unflatten(-1, (config.num_key_value_heads, -1, config.head_dim))
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        repeats = query.size(2) // key.size(2)
        key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        cos, sin = rows.context.rotation
        query, key = (_rotated(part, cos[0], sin[0]) for part in (query, key))
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / config.head_dim**0.5
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value).flatten(2)
        u = norm(u + mixed @ weight["proj"].view(x.size(-1), -1).T, 2)
        gate, up = (norm(u, 3) @ weight["fc1"].view(-1, x.size(-1)).T).chunk(2, dim=-1)
        state = norm(u + (F.silu(gate) * up) @ weight["fc2"].view(x.size(-1), -1).T, 4)
        states.append(state)
    return states


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _gru(experts: Any, x: torch.Tensor, _: Any) -> list[torch.Tensor]:
    weight, bias = experts.gru[0], experts.gru_bias[0]
    cell = torch.nn.GRUCell(weight.size(-1), weight.size(-1))
    # Reset and update gate have the sum of what the state meets as input and as state: all of it as input.
    for name, parts in (("weight", weight), ("bias", bias)):
        getattr(cell, f"{name}_ih").copy_(parts[:3].flatten(0, 1))
        getattr(cell, f"{name}_hh").copy_(torch.cat((torch.zeros_like(parts[:2]), parts[3:])).flatten(0, 1))
    state = F.gelu(F.linear(x, experts.fc1[0], experts.fc1_bias[0])).flatten(0, -2)
    states = []
    for _ in range(_STEPS):
        state = cell(state, state)
        states.append(state)
    return states


def _sequential(experts: Any, x: torch.Tensor, _: Any) -> list[torch.Tensor]:
    q = F.linear(F.gelu(F.linear(x, experts.fc1[0], experts.fc1_bias[0])), experts.fc2[0], experts.fc2_bias[0])
    cell, states = torch.zeros_like(q), []
    for _ in range(_STEPS):
        i, f, g, o = F.linear(q, experts.lstm[0].flatten(0, 1), experts.lstm_bias[0].flatten()).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        gate = (q @ experts.gate[0, 0] + experts.gate_bias[0]).sigmoid().unsqueeze(-1)
        q = gate * o.sigmoid() * cell.tanh() + (1 - gate) * q
        states.append(q)
    return states


def _append(expected: list[Any], reference: Any, module: torch.nn.Module, call: tuple, _: Any) -> None:
    if type(call[-1]).__name__ == "Rows":  # Else what was iterated is contracted.
        expected.append(reference(module, *call))


@pytest.mark.parametrize("name", [name for name in _RECURRENT if name not in _LOOPED])
@torch.no_grad()
def test_states_of_layers_equal_a_loop_over_their_parts(name: str) -> None:
    """With one expert, so that its rows are the tokens in their order."""
    model, expected = random_model(name, num_experts=1, num_experts_per_tok=1), []
    references = {"RecurrentBlock": _block, "GRUExperts": _gru, "SequentialExperts": _sequential}
    for module in model.modules():
        reference = references.get(type(module).__name__)
        if reference is not None:
            module.register_forward_hook(functools.partial(_append, expected, reference))
        elif type(module).__name__ == "IteratedLayer":
            inputs: list[torch.Tensor] = []
            module.post_attention_layernorm.register_forward_hook(lambda _, call, __, to=inputs: to.append(call[0]))
            module.register_forward_hook(lambda _, __, out, of=inputs: expected.append([*of[1:], out[0]]))
    states = _states(model)
    wanted = torch.stack([torch.stack(steps) for steps in expected]).view_as(states)
    torch.testing.assert_close(states, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_recurrence_there_are_no_states() -> None:
    assert _states(random_model("moe")) is None
    assert random_model("recurrent_moe")(tokens()).recurrent_states is None


@torch.no_grad()
def test_router_logits_by_layer_and_step() -> None:
    model = random_model("recurrent_moe", moe_layers=[False, True])
    logits = model(tokens(), output_router_logits=True, num_steps=_STEPS).router_logits
    by_layer = logits.by_layer()
    assert list(by_layer) == [1]
    assert by_layer[1].shape == (_STEPS, *tokens().shape, 4)
    assert torch.equal(by_layer[1][2].flatten(0, 1), logits.at(1, 2))
    heads = random_model("moeut")(tokens(), output_router_logits=True, num_steps=2).router_logits.by_layer("value")
    assert heads[0].shape == (2, *tokens().shape, 4, 8)
