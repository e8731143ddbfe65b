"""Megatron's options, each tried once."""

import math

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, History

_RUN = f"{TINY} --num-layers 2 --train-iters 3"
_BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-aux-loss-coeff 0"

OPTIONS = {
    "top-1": "--moe-router-topk 1",
    "top-2": "--moe-router-topk 2",
    "capacity factor": "--moe-expert-capacity-factor 1.0",
    "expert bias": _BIAS,
    "layer frequency": "--moe-layer-freq 2",
    "no shared expert": "--moe-shared-expert-intermediate-size 0",
    "grouped queries": "--group-query-attention --num-query-groups 2",
    "query-key norm": "--qk-layernorm",
    "layer norm": "--normalization LayerNorm",
    "tied embeddings": "--tie-embeddings-and-output-weights",
    "GELU": "--no-swiglu",
    "bf16": "--bf16",
    "learnt positions": "--position-embedding-type learned_absolute",
    "cyclic": "--dataloader-type cyclic",
    "micro-batch depth": "--recurrence-sampling uniform --recurrence-sampling-unit micro-batch",
    "grouped GEMM": "--moe-grouped-gemm",
    "document masks": "--reset-position-ids --reset-attention-mask --eod-mask-loss",
    "per-token loss": "--calculate-per-token-loss",
    "grad statistics": "--log-params-norm --log-num-zeros-in-grad --log-throughput",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "sgd": "--optimizer sgd --no-use-distributed-optimizer",
    "batch size schedule": "--step-batch-size-schedule '0:2 64:4' --micro-batch-size 1",
    "evaluation": "--eval-iters 2 --eval-interval 2",
    "full validation": "--full-validation --eval-interval 2",
    "exit interval": "--exit-interval 2",
    "multi-token prediction": "--mtp-num-layers 1 --router-min-entropy 1.0",
    "orthogonality": "--more-variant shared_block --projection-orthogonality-coeff 0.1 --mtp-num-layers 1",
    "skip train": "--skip-train --eval-iters 1",
}
_STEPS = {"exit interval": 2, "skip train": 0}


@pytest.fixture(scope="module")
def histories() -> dict[str, History]:
    """Return what a run with each option reported."""
    lines = [f"{_RUN} {flags}" for flags in OPTIONS.values()]
    # Of the two flags one may be given.
    lines = [line.replace("--global-batch-size 4 ", "") if "--step-batch-size" in line else line for line in lines]
    return dict(zip(OPTIONS, run_ranks(1, train_all, lines)[0], strict=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_trains(histories: dict[str, History], option: str) -> None:
    history = histories[option]
    assert len(history.losses) == _STEPS.get(option, 3)
    assert all(math.isfinite(loss) and loss > 0 for loss in history.losses)
    assert all(math.isfinite(norm) and norm > 0 for norm in history.grad_norms)


@pytest.mark.parametrize(
    "option", ["top-1", "expert bias", "layer frequency", "no shared expert", "grouped queries", "layer norm", "bf16"]
)
def test_takes_effect(histories: dict[str, History], option: str) -> None:
    assert histories[option].losses != histories["evaluation"].losses


def test_depth_of_each_micro_batch_is_drawn(histories: dict[str, History]) -> None:
    # The mean over the micro-batches of a step.
    assert any(steps != round(steps) for steps in histories["micro-batch depth"].steps)
