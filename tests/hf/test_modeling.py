"""The model in transformers: what it computes, what it takes and returns, and how it is saved."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from more_megatron.hf.exported import parts
from more_megatron.hf.exported.configuration_more import MoREConfig
from more_megatron.hf.exported.modeling_more import MoREForCausalLM, MoREModel
from more_megatron.hf.exported.noise import state_noise
from more_megatron.hf.exported.system import find_system
from more_megatron.model import noise
from tests.helpers.ranks import run_ranks
from tests.hf.reference_models import (
    CASES,
    HIDDEN,
    LAYERS,
    STEPS,
    SYSTEMS,
    VOCABULARY,
    Case,
    Result,
    compute,
    load,
    random_model,
    tokens,
)

_RECURRENT = [name for name in SYSTEMS if find_system(name).recurrent]
_WITH_STATES = [name for name in SYSTEMS if find_system(name).num_states(random_model(name).config) > 0]


@pytest.fixture(scope="module")
def megatron() -> dict[int, Result]:
    """What Megatron computes in each case, by the case's identity."""
    results = run_ranks(1, compute, [(case.variant, case.name) for case in CASES])[0]
    return {id(case): result for case, result in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.variant}, {case.name}")
def test_logits_equal_those_of_the_training_code(case: Case, megatron: dict[int, Result]) -> None:
    parameters, expected = megatron[id(case)]
    model = load(case, parameters)
    for steps in STEPS:
        with torch.no_grad():
            logits = model(tokens(), num_steps=steps).logits
        torch.testing.assert_close(logits, torch.from_numpy(expected[steps]), atol=5e-5, rtol=0)
    if case.variant in _RECURRENT:
        assert np.abs(expected[1] - expected[4]).max() > 0.1


def test_noise_is_that_of_the_training_code() -> None:
    positions = torch.tensor([[0, 1, 2, 700], [5, 0, 0, 65000]])
    own = state_noise(positions, 10, seed=1234, layer=3, std=0.7)
    flat = positions.flatten()
    theirs = noise.state_noise(torch.zeros_like(flat), flat, 10, seed=1234, layer=3, std=0.7)
    assert torch.equal(own.flatten(0, 1), theirs)


@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_padding_changes_nothing(variant: str) -> None:
    model, ids = random_model(variant), tokens()
    short = model(ids[1:, :17]).logits
    for pad, place in (("left", slice(7, None)), ("right", slice(0, 17))):
        batch = ids.clone()
        batch[1, place] = ids[1, :17]
        mask = torch.ones_like(batch)
        mask[1] = 0
        mask[1, place] = 1
        logits = model(batch, attention_mask=mask).logits
        torch.testing.assert_close(logits[1:, place], short, atol=1e-5, rtol=0, msg=lambda text, pad=pad: pad + text)
        torch.testing.assert_close(logits[:1], model(ids[:1]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_a_token_changes_only_what_follows_it(variant: str) -> None:
    model, ids = random_model(variant), tokens()
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % VOCABULARY
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)
    assert difference[0, :11].max() < 1e-5
    assert difference[1].max() < 1e-5
    assert difference[0, 11] > 0.1
    assert difference[0, 12:].max() > 1e-3


@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_number_of_steps(variant: str) -> None:
    model, ids = random_model(variant), tokens()
    assert torch.equal(model(ids).logits, model(ids, num_steps=3).logits)
    deeper = model(ids, num_steps=torch.tensor(5)).logits
    assert torch.equal(model(ids).logits, deeper) == (variant not in _RECURRENT)
    model.config.mean_recurrence = 5
    assert torch.equal(model(ids).logits, deeper)
    with pytest.raises(ValueError, match="num_steps 0 must be at least 1"):
        model(ids, num_steps=0)


@pytest.mark.parametrize("variant", _WITH_STATES)
@torch.no_grad()
def test_initial_states(variant: str) -> None:
    model, ids = random_model(variant), tokens()
    positions, number = torch.arange(ids.size(1)).expand_as(ids), find_system(variant).num_states(model.config)
    noises = [state_noise(positions, HIDDEN, 1234, layer + 1, 0.5) for layer in range(number)]
    assert torch.equal(model(ids, input_states=torch.stack(noises)).logits, model(ids).logits)
    zeros = torch.zeros(number, *ids.shape, HIDDEN)
    at_rest = model(ids, input_states=zeros).logits
    assert torch.equal(model(ids, init_scale=0.0).logits, at_rest)
    assert (model(ids).logits - at_rest).abs().max() > 1e-3
    doubled = model(ids, init_scale=2.0).logits
    model.config.state_std = 1.0
    assert torch.equal(model(ids).logits, doubled)
    with pytest.raises(ValueError, match=rf"input_states has shape \({number}, 1, 24, 32\), and not \({number}, 2, 24"):
        model(ids, input_states=zeros[:, :1])


@torch.no_grad()
def test_loss_shifts_labels_and_skips_ignored_ones() -> None:
    model, ids = random_model("recurrent_experts"), tokens()
    labels = ids.clone()
    labels[0, 5:9] = -100
    output = model(ids, labels=labels)
    logs = output.logits.log_softmax(-1)
    losses = [
        -logs[row, place, labels[row, place + 1]]
        for row in range(len(ids))
        for place in range(ids.size(1) - 1)
        if labels[row, place + 1] != -100
    ]
    assert len(losses) == 2 * 23 - 4
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=7).loss
    assert summed.item() == pytest.approx(torch.stack(losses).sum().item() / 7, abs=1e-5)


@torch.no_grad()
def test_router_logits_and_balance_loss() -> None:
    model, ids = random_model("recurrent_moe", router_aux_loss_coef=0.25, router_score_function="sigmoid"), tokens()
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True, num_steps=2)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(ids.numel(), 4)] * (2 * LAYERS)
    losses = []
    for logits in output.router_logits:
        scores = logits.sigmoid()[mask.flatten() == 1]
        scores = scores / scores.sum(-1, keepdim=True)
        load = torch.bincount(scores.topk(2, dim=-1)[1].flatten(), minlength=4) / (2 * len(scores))
        losses.append(4 * (load * scores.mean(0)).sum())
    assert output.aux_loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    plain = model(ids, attention_mask=mask, labels=ids, num_steps=2)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.25 * output.aux_loss.item(), abs=1e-5)


@torch.no_grad()
def test_forms_of_the_output() -> None:
    model, ids = random_model("shared_block"), tokens()
    output = model(ids, output_hidden_states=True, use_cache=False)
    assert output.past_key_values is None
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], output.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:], atol=1e-6, rtol=0)
    picked = model(ids, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(picked, output.logits[:, [0, 7]], atol=1e-6, rtol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, output.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must have the shape \(b, T\)"):
        model(tokens()[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\), and not \(b, T\) = \(2, 24\)"):
        model(ids, attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("variant", SYSTEMS)
def test_gradients_with_and_without_recomputation(variant: str) -> None:
    model, ids = random_model(variant, shared_expert_intermediate_size=8), tokens()
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", SYSTEMS)
def test_mixed_precision(variant: str) -> None:
    model, ids = random_model(variant), tokens()
    exact = model(ids, labels=ids, num_steps=1).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, num_steps=1, output_router_logits=True)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.router_logits[0].dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_grouped_linear_with_and_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 12, 8, generator=generator, requires_grad=True)
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    groups = zip((rows[:3], rows[3:3], rows[3:9], rows[9:]), weight, strict=True)
    expected = torch.cat([group @ matrix.T for group, matrix in groups])
    direction = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad(expected, (rows, weight), direction)
    for has_kernel in (True, False):
        monkeypatch.setattr(parts, "_has_grouped_kernel", lambda *_, has=has_kernel: has)
        output = parts.grouped_linear(rows, weight, ends)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        found = torch.autograd.grad(output, (rows, weight), direction)
        torch.testing.assert_close(found, gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_a_saved_model_is_the_same_again(variant: str, tmp_path: Path) -> None:
    tied = variant == "shared_block"
    model, ids = random_model(variant, tie_word_embeddings=tied, pad_token_id=1), tokens()
    model.save_pretrained(tmp_path)
    again = MoREForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config._name_or_path}
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    # Weights are mapped from the file, and those that lie at odd addresses take another kernel.
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    close(again(ids).logits, model(ids).logits)
    base = MoREModel.from_pretrained(tmp_path)
    close(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert MoREForCausalLM.from_pretrained(tmp_path, mean_recurrence=7).config.mean_recurrence == 7


@torch.no_grad()
def test_half_precision_spares_the_router(tmp_path: Path) -> None:
    model, ids = random_model("recurrent_moe", router_expert_bias=True, router_score_function="sigmoid"), tokens()
    model.save_pretrained(tmp_path)
    half = MoREForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].mlp.gate.expert_bias, model.model.layers[0].mlp.gate.expert_bias)
    output = half(ids, output_router_logits=True, num_steps=1)
    assert output.logits.dtype == torch.bfloat16
    assert output.router_logits[0].dtype == torch.float32
    # Products of bfloat16 numbers are exact in the router: its input's rounding is all that is left.
    assert (output.router_logits[0] - model(ids, output_router_logits=True).router_logits[0]).abs().max() < 0.05


@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_weights_of_new_models(variant: str) -> None:
    torch.manual_seed(0)
    model = MoREForCausalLM(random_model(variant, initializer_range=0.03).config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert weight.eq(0.0).all(), name
        elif "norm" in name:
            assert weight.eq(1.0).all(), name
        elif weight.numel() >= 500:
            assert weight.std().item() == pytest.approx(0.03, rel=0.15), name
    assert model(tokens(), labels=tokens()).loss.item() == pytest.approx(np.log(VOCABULARY), abs=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "absent"}, "variant 'absent' does not exist"),
        ({"moe_layers": [True]}, "moe_layers names 1 layers of 12"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most 8, the number of experts"),
        ({"mean_recurrence": 0}, "mean_recurrence 0 must be at least 1"),
    ],
)
def test_contradictions_in_a_configuration(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoREConfig(**fields)


_WITHOUT_MEGATRON = """
import sys
sys.modules["megatron"] = sys.modules["more_megatron"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
ids = torch.load("ids.pt")
for variant in sys.argv[1:]:
    assert AutoConfig.from_pretrained(variant, trust_remote_code=True).variant == variant
    assert type(AutoModel.from_pretrained(variant, trust_remote_code=True)).__name__ == "MoREModel"
    model = AutoModelForCausalLM.from_pretrained(variant, trust_remote_code=True, mean_recurrence=2)
    made = model.generate(ids, max_new_tokens=4, do_sample=False, num_steps=3)
    torch.save((model(ids).logits.detach(), made), variant + ".pt")
    model.save_pretrained("again_" + variant)
"""


def test_a_saved_model_needs_transformers_alone(tmp_path: Path) -> None:
    ids = tokens()
    torch.save(ids, tmp_path / "ids.pt")
    models = {variant: random_model(variant, auto_map=_auto_map()) for variant in SYSTEMS}
    for variant, model in models.items():
        model.save_pretrained(tmp_path / variant)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_MEGATRON, *SYSTEMS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for variant, model in models.items():
        logits, made = torch.load(tmp_path / f"{variant}.pt")
        with torch.no_grad():
            torch.testing.assert_close(logits, model(ids, num_steps=2).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(made, model.generate(ids, max_new_tokens=4, do_sample=False))
        for name in ("modeling_more.py", "configuration_more.py"):
            assert (tmp_path / f"again_{variant}" / name).read_text() == (tmp_path / variant / name).read_text()


def _auto_map() -> dict[str, str]:
    return {
        "AutoConfig": "configuration_more.MoREConfig",
        "AutoModel": "modeling_more.MoREModel",
        "AutoModelForCausalLM": "modeling_more.MoREForCausalLM",
    }


@torch.no_grad()
def test_entropy_loss_is_pooled_over_the_tokens_and_passes_of_a_sequence() -> None:
    model, ids = random_model("moeut", balance_coef=0.5, head_balance_coef=0.25), tokens()
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    output = model(ids, attention_mask=mask, labels=ids, output_router_logits=True, num_steps=2)
    assert set(output.router_logits.routers) == {"router", "value", "output"}
    expected = 0.0
    for layer in range(LAYERS):
        for router, coefficient in (("router", 0.5), ("value", 0.25), ("output", 0.25)):
            passes = output.router_logits.by_layer(router)[layer].softmax(-1)
            entropies = []
            for row, length in enumerate((24, 20)):
                mean = passes[:, row, :length].mean((0, 1))
                entropies.append(-(mean * mean.log()).sum(-1).mean())
            expected -= coefficient * sum(entropies) / 2
    assert output.aux_loss.item() == pytest.approx(float(expected), abs=1e-5)
    plain = model(ids, attention_mask=mask, labels=ids, num_steps=2).loss
    assert output.loss.item() == pytest.approx(plain.item() + float(expected), abs=1e-5)
