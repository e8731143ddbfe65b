"""The Universal Transformer equals an independent computation, and halts as Tensor2Tensor's does."""

import itertools
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth
from more_megatron.model.halting import HALTING_FIGURES
from more_megatron.monitoring.figures import Figures, report_to
from more_megatron.systems import get_system
from more_megatron.training.model import check_system
from tests.helpers.models import HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, dense
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
    """Set weight and bias of halting so that positions halt in several passes, and some never."""
    model.decoder.loops["0"].halting.weight.mul_(10.0)
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

    figures = Figures(HALTING_FIGURES)
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


def test_wrong_settings_end_in_one_line() -> None:
    for fields, message in (
        ({"halting_epsilon": 1.0}, "--halting-epsilon 1 must be at least 0 and below 1"),
        ({"ponder_coeff": -1.0}, "--ponder-coeff -1 must be at least 0"),
        (
            {"recurrence_eval_steps": 5},
            "at 5: lower --recurrence-eval-steps .* or give --universal-time-signal sinusoid",
        ),
        ({"recurrence_eval_depths": [2, 7]}, "at 7: lower .* --recurrence-eval-depths"),
        ({"add_bias_linear": True}, "leave out --enable-bias-linear"),
        ({"num_layers": 2, "pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}, "a group must lie on"),
    ):
        with pytest.raises(MoREError, match=message):
            check_system(_config(**fields))
    check_system(_config(recurrence_eval_steps=5, universal_time_signal="sinusoid"))


def test_flags_that_mean_nothing_with_or_without_halting_are_refused() -> None:
    system = get_system("universal")
    act = {"recurrence_sampling": "uniform", "recurrence_max_steps": 6, "recurrence_steps": 3}
    faults = list(system.without_effect(system.flags(Namespace(**act)), set(act)))
    assert [fault.partition(" ")[0] for fault in faults] == ["--recurrence-sampling", "--recurrence-steps"]
    none = {"halting": "none", "halting_epsilon": 0.1, "ponder_coeff": 0.1}
    faults = list(system.without_effect(system.flags(Namespace(**none)), set(none)))
    assert [fault.partition(" ")[0] for fault in faults] == ["--halting-epsilon", "--ponder-coeff"]
    # The limit, in training and by default in evaluation.
    flags = system.flags(Namespace(recurrence_max_steps=6))
    assert (flags.mean_steps, flags.max_steps, flags.evaluation_steps) == (6, 6, 6)
    assert system.flags(Namespace(recurrence_steps=3)).max_steps == 3
    assert not list(system.without_effect(flags, {"recurrence_max_steps"}))


def _more_steps_than_were_learned() -> None:
    start_ranks()
    embeddings = torch.zeros(_LENGTH, _BATCH, HIDDEN)
    model = gpt_model(_config(), _LENGTH).eval()
    with pytest.raises(MoREError, match=f"trained for {_LIMIT} steps.*--universal-time-signal sinusoid"):
        logits(model, embeddings, Depth(_LIMIT + 1, 0))
    logits(gpt_model(_config(universal_time_signal="sinusoid"), _LENGTH).eval(), embeddings, Depth(_LIMIT + 1, 0))


def test_a_learned_time_signal_has_a_last_step() -> None:
    run_ranks(1, _more_steps_than_were_learned)


def _beginning() -> None:
    start_ranks()
    hidden, width = 64, 128
    sizes = {"hidden_size": hidden, "ffn_hidden_size": width, "recurrence_max_steps": 8}
    for experts in ({}, {"num_moe_experts": 4, "moe_ffn_hidden_size": width}):
        config = _config(**sizes, **experts)
        model = gpt_model(config, _LENGTH, position_embedding_type="none")
        stds = {"embedding": hidden**-0.5, "loops.0.signals.time": hidden**-0.5}
        for name, parameter in model.named_parameters():
            bound = math.sqrt(6 / (hidden + (width if ".mlp." in name else hidden)))
            std = next((std for part, std in stds.items() if part in name), None)
            if "norm" in name or name.endswith("bias"):
                assert parameter.unique().tolist() == [float(not name.endswith("bias") or "halting" in name)], name
            elif std is not None:
                assert float(parameter.std()) == pytest.approx(std, rel=0.1), name
            elif parameter.dim() == 2 and "decoder.layers" in name:
                assert float(parameter.abs().max()) == pytest.approx(bound, rel=0.05), name
        counted = get_system("universal").cost(config, _LENGTH).parameters
        inside = [p.numel() for name, p in model.decoder.named_parameters() if "final_layernorm" not in name]
        assert counted == sum(inside)


def test_initial_weights_and_their_number() -> None:
    run_ranks(1, _beginning)


def _dropout_and_resume(folder: str) -> None:
    run = (
        f"{dense(TINY)} --num-layers 1 --more-variant universal --attention-dropout 0.1 --hidden-dropout 0.1 "
        f"--recurrence-max-steps 3 --recurrence-backprop-steps 2 --tensor-model-parallel-size 2 --save {folder}"
    )
    whole, first, second = train_all(
        [
            run.replace("--save", "--save-interval 100 --save") + "/whole",
            f"{run}/part --save-interval 3 --exit-interval 3",
            f"{run}/part --save-interval 100 --load {folder}/part",
        ]
    )
    assert [*first.losses, *second.losses] == whole.losses
    assert [*first.grad_norms, *second.grad_norms] == whole.grad_norms
    assert [*first.figures, *second.figures] == whole.figures


@pytest.mark.matrix
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    run_ranks(2, _dropout_and_resume, str(tmp_path))
