"""The Universal Transformer equals an independent computation, and halts as Tensor2Tensor's does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from more_megatron.model.depth import Depth
from more_megatron.model.halting import HALTING_FIGURES
from more_megatron.monitoring.figures import Figures, report_to
from more_megatron.systems import get_system
from tests.helpers.models import HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks
from tests.systems.universal_reference import Universal

_LENGTH, _BATCH, _LIMIT, _PONDER = 7, 2, 4, 0.3
_FORMS = list(itertools.product(("learned", "sinusoid"), (False, True), ("accumulated", "basic", "none")))


def _config(**fields: Any) -> Any:
    """Return the configuration of a model in the form of the paper, but for what differs."""
    defaults: dict[str, Any] = {
        "num_moe_experts": None,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "recurrence_max_steps": _LIMIT,
        "ponder_coeff": _PONDER,
    }
    if fields.get("halting") == "none":
        defaults |= {"recurrence_steps": _LIMIT}
    return small_config("universal", **(defaults | fields))


def _reference(model: Any) -> Universal:
    """Return the independent computation with a copy of the weights of a model."""
    config = model.config
    return Universal(
        {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()},
        config.num_attention_heads,
        config.num_layers,
        config.moe_router_topk if config.num_moe_experts else 0,
        config.universal_post_norm,
        config.universal_time_signal == "sinusoid",
        config.halting_output if config.halting == "act" else "none",
    )


@torch.no_grad()
def _let_some_halt(model: Any, embeddings: torch.Tensor, depth: Depth) -> None:
    """Set the bias of halting so that positions halt in several passes, and some never."""
    bias = model.decoder.loops["0"].halting.bias
    for value in torch.arange(2.0, -6.0, -0.5):
        bias.fill_(value)
        outcome = _reference(model)(embeddings, depth.steps, 0)
        if not outcome.halted.all() and len(set(outcome.steps.flatten().tolist())) > 1:
            return
    raise AssertionError("no bias lets positions halt in several passes")


def _compare(form: tuple[str, bool, str], depth: Depth, **fields: Any) -> None:
    time, post_norm, rule = form
    halting = {"halting": "none"} if rule == "none" else {"halting_output": rule}
    config = _config(universal_time_signal=time, universal_post_norm=post_norm, **halting, **fields)
    model = gpt_model(config, _LENGTH, weight_std=0.3, position_embedding_type="none")
    embeddings = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.3
    if rule != "none":
        _let_some_halt(model, embeddings, depth)
    reference, where = _reference(model), f"{form} {depth} {fields}"
    probe = torch.randn(_BATCH, _LENGTH, 24, generator=torch.Generator().manual_seed(2)) * 0.1

    figures = Figures(get_system("universal").figures(config))
    report_to(figures)
    inputs = embeddings.clone().requires_grad_()
    output = logits(model.train(), inputs, depth, (3, 8))
    (output * probe).sum().backward()
    others = embeddings.clone().requires_grad_()
    expected = reference(others, depth.no_grad_steps, depth.grad_steps)
    loss = (expected.logits * probe).sum()
    if rule != "none":
        loss = loss + _PONDER * expected.ponder_cost()
        measured = (expected.steps, expected.remainder, ~expected.halted, expected.steps + expected.remainder)
        means = {name: float(x.detach().double().mean()) for name, x in zip(HALTING_FIGURES, measured, strict=True)}
        assert figures.means() == pytest.approx(means, rel=1e-5), where
    loss.backward()
    _assert_equal(output, expected.logits, where)
    _assert_equal(inputs.grad, others.grad, where)
    for name, parameter in model.named_parameters():
        _assert_equal(parameter.grad, reference.weights[name].grad, f"{where} {name}")


def _assert_equal(found: torch.Tensor | None, wanted: torch.Tensor | None, where: str) -> None:
    """Compare tensors, or gradients, of which no gradient is one of zero."""
    found, wanted = (torch.zeros(1) if x is None else x for x in (found, wanted))
    scale = max(float(wanted.detach().abs().max()), 1.0)
    largest = float((found - wanted).detach().abs().max())
    assert largest < 1e-5 * scale, f"{where}: {largest} at {scale}"


def _compare_all() -> None:
    start_ranks()
    for form in _FORMS:
        for depth in (Depth(0, _LIMIT), Depth(2, 2)):
            _compare(form, depth, num_layers=2)
    modes = list(RECOMPUTATION.values())
    for index, form in enumerate(_FORMS):
        # Every form, and every rule of the output under every kind of recomputation.
        mode = modes[(index + index // 3) % 3]
        _compare(form, Depth(1, _LIMIT - 1), num_moe_experts=4, moe_router_topk=2, **mode)
    for depth in (Depth(0, 3), Depth(1, 2)):
        _compare(_FORMS[0], depth, num_layers=2, **RECOMPUTATION["full"])


def test_equals_an_independent_computation() -> None:
    run_ranks(1, _compare_all)
