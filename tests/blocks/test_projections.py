"""The penalty on projections that are not orthogonal: its value, its gradient, and that no layout changes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

from more_megatron.blocks.layer import LayerInputs
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from tests.helpers.models import EXPERTS, HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY

_COEFFICIENT = 0.3
_LENGTH, _BATCH = 8, 2


def _model(**fields: Any) -> GPTModel:
    config = small_config("shared_block", projection_orthogonality_coeff=_COEFFICIENT, **fields)
    return gpt_model(config, _LENGTH, weight_std=0.2).train()


def _plain_penalty(weights: list[torch.Tensor]) -> torch.Tensor:
    identity = torch.eye(HIDDEN)
    return sum(((weight @ weight.T - identity) ** 2).sum() / HIDDEN for weight in weights) / len(weights)


def _hidden() -> torch.Tensor:
    return torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(0))


def _value_and_gradient() -> None:
    start_ranks()
    moe = _model().decoder.layers[0].mlp
    leaves = [moe.experts.proj_in, moe.experts.proj_out]
    plain = _plain_penalty([weight for leaf in leaves for weight in leaf])
    torch.testing.assert_close(moe.experts.orthogonality_penalty(), plain)
    expected = torch.autograd.grad(_COEFFICIENT * plain, leaves)
    output, _ = moe(_hidden(), LayerInputs(MicroBatch(Depth(0, 1), (0, 1))))
    # The output itself without weight: what remains is the penalty.
    for ours, theirs in zip(torch.autograd.grad((output * 0.0).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    _recorded_once()
    _absent_in_evaluation(moe)


def _recorded_once() -> None:
    for fields in RECOMPUTATION.values():
        destroy_moe_metrics_tracker()
        model = _model(**fields)
        embeddings = _hidden().requires_grad_()
        logits(model, embeddings, Depth(2, 2), (0, 1)).sum().backward()
        recorded = float(get_moe_metrics_tracker().metrics["orthogonality_loss"].values.sum())
        penalty = float(model.decoder.layers[0].mlp.experts.orthogonality_penalty())
        assert recorded == pytest.approx(penalty, rel=1e-6), fields


def _absent_in_evaluation(moe: torch.nn.Module) -> None:
    destroy_moe_metrics_tracker()
    moe.eval()
    output, _ = moe(_hidden(), LayerInputs(MicroBatch(Depth(0, 1))))
    (gradient,) = torch.autograd.grad((output * 0.0).sum(), moe.experts.proj_in)
    assert torch.count_nonzero(gradient) == 0
    assert get_moe_metrics_tracker().metrics == {}


def test_the_penalty_has_the_value_and_gradient_of_its_formula() -> None:
    run_ranks(1, _value_and_gradient)


# Projections start orthogonal; a large step takes them away from it, a large coefficient makes the penalty felt.
_RUN = (
    f"{TINY} --split 1,0,0 --num-layers 2 --micro-batch-size 1 --lr 0.02 --train-iters 4 "
    "--more-variant shared_block --recurrence-steps 2"
)
_PENALISED = f"{_RUN} --projection-orthogonality-coeff 0.5"
_EP2 = "--expert-model-parallel-size 2"
_TP2 = "--tensor-model-parallel-size 2"
_LAYOUTS = {
    "dp2": "",
    "ep2": _EP2,
    "ep2 allgather": f"{_EP2} --moe-token-dispatcher-type allgather",
    "tp2 etp2": _TP2,
    "tp2 ep2": f"{_TP2} {_EP2} --expert-tensor-parallel-size 1",
}


def test_no_layout_changes_the_gradient_of_the_penalty(tmp_path: Path) -> None:
    first_step = f"{_PENALISED} --save {tmp_path} --save-interval 1 --exit-interval 1"
    ((_, free, expected),) = run_ranks(1, train_all, [first_step, _RUN, _PENALISED])
    assert free.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=1e-4)
    assert abs(free.grad_norms[-1] - expected.grad_norms[-1]) > 1e-2 * free.grad_norms[-1]
    histories = run_ranks(2, train_all, [f"{_PENALISED} --load {tmp_path} {flags}" for flags in _LAYOUTS.values()])[-1]
    for name, history in zip(_LAYOUTS, histories, strict=True):
        assert history.grad_norms == pytest.approx(expected.grad_norms[1:], rel=1e-5), name
        assert history.losses == pytest.approx(expected.losses[1:], rel=1e-5), name


def _dropped() -> None:
    start_ranks()
    config = small_config("shared_block", projection_dropout=0.5, moe_router_topk=EXPERTS)
    moe = gpt_model(config, _LENGTH, weight_std=0.2).decoder.layers[0].mlp
    inputs = LayerInputs(MicroBatch(Depth(0, 1)))
    with torch.no_grad():
        moe.eval()
        assert torch.equal(moe(_hidden(), inputs)[0], moe(_hidden(), inputs)[0])
        moe.train()
        assert not torch.equal(moe(_hidden(), inputs)[0], moe(_hidden(), inputs)[0])


def test_projections_are_dropped_out_in_training_only() -> None:
    run_ranks(1, _dropped)
