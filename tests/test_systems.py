"""Every system: causal, sequences apart, and settings refused that it cannot serve."""

import dataclasses
import itertools
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags, flag
from more_megatron.model.depth import Depth
from more_megatron.systems import get_system, systems
from more_megatron.training.model import check_system
from tests.helpers.models import EXPERTS, HIDDEN, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 10, 2
# Both kinds of steps: those without gradient must be causal as well.
_DEPTH = Depth(no_grad_steps=1, grad_steps=2)
_SAMPLES = (3, 8)

_TP_FLAG = "--tensor-model-parallel-size"
_TP2 = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}
_TP4_ETP2 = _TP2 | {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2}
_CP2 = {"context_parallel_size": 2}
_ORTHOGONAL = {"projection_orthogonality_coeff": 0.1}
_DROPOUT = {"projection_dropout": 0.1}
_EMA = {"router_logit_ema": 0.5}
_FLOOR = {"router_min_entropy": 0.5}
_SCALE = {"recurrence_residual_scale": 0.5}
_PADDED = {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0}
_RECURRENT = [name for name, variant in systems().items() if variant.recurrent]
# In training or not, and experts of a token; None: without experts, where that is the default.
_MODES = list(itertools.product((True, False), (1, 2, None)))


@pytest.mark.parametrize("variant", systems())
def test_a_token_reaches_neither_the_past_nor_other_sequences(variant: str) -> None:
    (modes,) = run_ranks(1, _influences, variant)
    for (training, topk), (gradients, perturbations) in modes.items():
        where = f"{variant}, training {training}, top-{topk}"
        _check(gradients, largest_leak=0.0, where=f"gradient: {where}")
        # Rounding only: which rows share a product depends on what other tokens choose.
        _check(perturbations, largest_leak=3e-6, where=f"perturbation: {where}")


@torch.no_grad()
def _effects_of_capacity(variant: str) -> dict[str, tuple[float, float, float]]:
    """Return how far capacity moves the logits: in training, in evaluation, and in training after an evaluation."""
    start_ranks()
    fields = {"num_layers": 2, "moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss"}
    embeddings = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(0))
    dropless = gpt_model(small_config(variant, **fields), _LENGTH, weight_std=0.2)
    expected = logits(dropless, embeddings, _DEPTH)
    effects = {}
    for name, capacity in (("dropped", {}), ("padded", {"moe_pad_expert_input_to_capacity": True})):
        if capacity and get_system(variant).mixes_tokens:
            continue
        config = small_config(variant, **fields, **capacity, moe_expert_capacity_factor=0.5)
        model = gpt_model(config, _LENGTH, weight_std=0.2)
        outputs = [logits(model.train(mode), embeddings, _DEPTH) for mode in (True, False, True)]
        effects[name] = tuple(float((output - expected).abs().max()) for output in outputs)
    return effects


@pytest.mark.parametrize("variant", systems())
def test_tokens_above_capacity_are_dropped_in_training_only(variant: str) -> None:
    (effects,) = run_ranks(1, _effects_of_capacity, variant)
    for name, (before, evaluation, after) in effects.items():
        assert before > 0.1, name
        assert evaluation < 1e-6, name
        assert after == before, name


@pytest.mark.parametrize(
    ("variant", "fields", "flags"),
    [
        ("recurrent_experts", _TP2, ["--expert-model-parallel-size", "--expert-tensor-parallel-size", _TP_FLAG]),
        ("shared_block", _TP2, ["--expert-model-parallel-size", "--expert-tensor-parallel-size", _TP_FLAG]),
        *((name, _CP2, [f"--more-variant {name}", "--context-parallel-size"]) for name in _RECURRENT),
        ("shared_block", _TP4_ETP2, ["--expert-tensor-parallel-size 1 or 4"]),
        ("recurrent_experts", {"moe_token_dispatcher_type": "flex"}, ["--moe-token-dispatcher-type allgather or"]),
        ("shared_block", _PADDED, ["--moe-pad-expert-input-to-capacity"]),
        ("shared_block_ffn", {"add_bias_linear": True}, ["--enable-bias-linear"]),
        ("shared_block", _ORTHOGONAL | {"calculate_per_token_loss": True}, ["--calculate-per-token-loss"]),
        ("no_such_system", {}, ["--more-variant no_such_system", *systems()]),
    ],
)
def test_a_setting_that_cannot_be_served_is_refused_by_name(
    variant: str, fields: dict[str, Any], flags: list[str]
) -> None:
    with pytest.raises(MoREError) as refusal:
        check_system(small_config(variant, **fields))
    message = str(refusal.value)
    assert "\n" not in message
    for name in flags:
        assert name in message


@pytest.mark.parametrize("variant", systems())
def test_a_flag_that_a_system_never_reads_is_refused_if_it_is_given(variant: str) -> None:
    system = get_system(variant)
    flags = system.flags(Namespace(recurrence_sampling="uniform", router_min_entropy=0.5))
    shared = {field.name for field in dataclasses.fields(MoREFlags)} - {"more_variant"}
    own = {name for other in systems().values() for name in other.own_flags()}
    faults = [fault for fault in system.without_effect(flags, shared | own) if "never reads" in fault]
    assert len(faults) == len((shared | own) - system.reads - set(system.own_flags()))
    for name in (shared | own) - system.reads - set(system.own_flags()):
        assert f"--more-variant {variant} never reads {flag(name)}: leave it out" in faults
    assert not list(system.without_effect(flags, set()))
    assert not list(system.without_effect(system.flags(Namespace()), set()))


@pytest.mark.parametrize("variant", _RECURRENT)
def test_every_recurrence_can_be_compared_at_any_depth(variant: str) -> None:
    system = get_system(variant)
    fields = {"recurrence_sampling": "uniform", "recurrence_min_steps": 2, "recurrence_max_steps": 4}
    fields |= {"recurrence_eval_steps": 8, **system.comparable}
    assert not list(system.without_effect(system.flags(Namespace(**fields)), set(fields)))
    check_system(small_config(variant, **fields))


def test_a_flag_without_effect_under_these_settings_is_refused() -> None:
    given = {"recurrence_min_steps", "recurrence_sampling_unit", "router_min_entropy_coeff"}
    faults = list(get_system("recurrent_moe").without_effect(MoREFlags(), given))
    assert [fault.partition(" ")[0] for fault in faults] == [
        "--recurrence-min-steps",
        "--recurrence-sampling-unit",
        "--router-min-entropy-coeff",
    ]


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        *((name, {}) for name in systems()),
        ("moe", _CP2),
        ("recurrent_experts", _TP2 | {"expert_model_parallel_size": 2}),
        ("recurrent_experts", _TP2 | {"expert_tensor_parallel_size": 2}),
        ("shared_block", _TP2 | {"expert_model_parallel_size": 4}),
        ("shared_block", _ORTHOGONAL | _DROPOUT),
        # Whose experts do not mix tokens needs no meeting place for them.
        ("shared_block_ffn", _TP2),
        ("recurrent_moe", _TP2 | _EMA | _FLOOR | _SCALE),
    ],
)
def test_a_setting_that_can_be_served_is_accepted(variant: str, fields: dict[str, Any]) -> None:
    check_system(small_config(variant, **fields))


def _states_follow_samples() -> None:
    start_ranks()
    generator = torch.Generator().manual_seed(0)
    sequence, other = torch.randn(2, _LENGTH, 1, HIDDEN, generator=generator)
    for name in systems():
        config = small_config(name, num_layers=2, moe_router_topk=2, recurrence_state_std=1.0, recurrence_eval_steps=3)
        model = gpt_model(config, _LENGTH, weight_std=0.2)
        twice, mixed = torch.cat((sequence, sequence), dim=1), torch.cat((other, sequence), dim=1)
        model.eval()
        first, second = logits(model, twice, Depth(3, 0))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        # Without a record of the micro-batch an evaluation takes the configured number of steps.
        positions = torch.arange(_LENGTH).expand(2, -1)
        unasked = model(None, positions, None, decoder_input=twice)
        torch.testing.assert_close(unasked[0], first, rtol=1e-5, atol=1e-5)
        model.train()
        first, second = logits(model, twice, _DEPTH, (4, 5))
        has_state = "recurrence_state_std" in get_system(name).reads
        assert (float((first - second).abs().max()) > 1e-3) == has_state
        # The same sample in other company, at another place of the batch.
        again = logits(model, mixed, _DEPTH, (9, 4))[1]
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-5)


def test_initial_states_belong_to_the_sample_in_training_and_to_none_in_evaluation() -> None:
    run_ranks(1, _states_follow_samples)


def test_a_layer_pattern_must_have_the_length_of_the_model() -> None:
    with pytest.raises(MoREError, match="--moe-layer-freq names 2 layers, --num-layers is 3"):
        get_system("moe").stack(small_config("moe", num_layers=3, moe_layer_freq=[1, 0]))


def _check(influence: torch.Tensor, largest_leak: float, where: str) -> None:
    """Check the influence of each embedding on each logit, [b, s] of the logits by [b, s] of the embeddings."""
    position = torch.arange(_LENGTH)
    is_past = position.view(1, -1, 1, 1) >= position.view(1, 1, 1, -1)
    is_same = torch.eye(_BATCH, dtype=torch.bool).view(_BATCH, 1, _BATCH, 1)
    allowed = is_past & is_same
    assert influence[~allowed].max() <= largest_leak, where
    assert influence[allowed].min() > 1e-4, f"no influence where there must be one: {where}"


def _influences(variant: str) -> dict[tuple[bool, int | None], tuple[torch.Tensor, torch.Tensor]]:
    start_ranks()
    found = {}
    for training, topk in _MODES:
        if topk is None and get_system(variant).defaults.get("num_experts", EXPERTS) is not None:
            continue
        experts = {"moe_router_topk": topk, "moe_shared_expert_intermediate_size": HIDDEN}
        # A layer more where there can be a prelude and a coda. A norm magnifies the rounding of a small state.
        fields = {"num_layers": 3 if "recurrence_prelude_layers" in get_system(variant).reads else 2}
        fields |= {"recurrence_state_std": 1.0} | (experts if topk else {"num_moe_experts": None})
        config = small_config(variant, **fields)
        model = gpt_model(config, _LENGTH, weight_std=0.2).train(training)
        samples = _SAMPLES if training else ()
        embeddings = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(topk or 0))
        found[training, topk] = _gradients(model, embeddings, samples), _changes(model, embeddings, samples)
    return found


def _gradients(model: GPTModel, embeddings: torch.Tensor, samples: tuple[int, ...]) -> torch.Tensor:
    """Return the largest gradient of the logits at [b, s] with respect to the embedding of [b, s].

    The logits of a place are weighed at random: if the gradient of one of them is not zero, that of their sum is not.
    """
    embeddings = embeddings.clone().requires_grad_()
    output = logits(model, embeddings, _DEPTH, samples)
    weighed = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum(-1)
    rows = []
    for scalar in weighed.flatten():
        (gradient,) = torch.autograd.grad(scalar, embeddings, retain_graph=True)
        rows.append(gradient.abs().amax(-1).transpose(0, 1))
    return torch.stack(rows).view(_BATCH, _LENGTH, _BATCH, _LENGTH)


@torch.no_grad()
def _changes(model: GPTModel, embeddings: torch.Tensor, samples: tuple[int, ...]) -> torch.Tensor:
    """Return how far the logits at [b, s] move, in parts of the largest, when the embedding of [b, s] is another."""
    before = logits(model, embeddings, _DEPTH, samples)
    # The bar is one for logits about 1, not for large ones, whose rounding is larger.
    scale = before.abs().max().clamp(min=1.0)
    columns = []
    for sequence, position in itertools.product(range(_BATCH), range(_LENGTH)):
        changed = embeddings.clone()
        changed[position, sequence] = embeddings[position, sequence].flip(0) * 2.0
        columns.append((logits(model, changed, _DEPTH, samples) - before).abs().amax(-1) / scale)
    return torch.stack(columns, dim=-1).view(_BATCH, _LENGTH, _BATCH, _LENGTH)
