"""Training runs of `pretrain_more.py` on one GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from more_megatron.platform.packages import has_package
from more_megatron.systems import systems
from tests.gpu.processes import BACKENDS, pretrain
from tests.helpers.program import losses_by_iteration

pytestmark = pytest.mark.gpu

_SMALL = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --ffn-hidden-size 256 "
    "--moe-ffn-hidden-size 128 --num-experts 4 --micro-batch-size 8 --global-batch-size 16 --split 1,0,0 "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 128 "
    "--lr 2e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 --log-interval 1 "
    "--moe-aux-loss-coeff 0.01 --eval-iters 0 --eval-interval 1000 --no-gradient-accumulation-fusion"
)
_TE = "--transformer-impl transformer_engine --moe-grouped-gemm"
_FP8 = f"{_TE} --fp8-format hybrid --fp8-recipe tensorwise"
# How much higher the loss in FP8 may be than in bf16 after 100 steps, in nats; it falls from 4.9 to below 2.
_MARGIN = 0.1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count up in steps of 1 to 4: easy to learn."""
    prefix = tmp_path_factory.mktemp("corpus") / "counting"
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(400):
        start, stride = random.integers(0, 126), random.integers(1, 5)
        builder.add_item(torch.from_numpy((start + stride * np.arange(80)) % 126))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def _losses(corpus: Path, variant: str, flags: str) -> list[float]:
    output = pretrain(f"{_SMALL} --data-path {corpus} --more-variant {variant} {flags}")
    return [float(loss) for _, loss in sorted(losses_by_iteration(output).items())]


@pytest.mark.skipif(not has_package("transformer_engine"), reason="needs Transformer Engine")
@pytest.mark.parametrize("variant", systems())
def test_fp8_reaches_the_loss_of_bf16(corpus: Path, variant: str) -> None:
    high, low = (_losses(corpus, variant, f"{flags} --train-iters 100") for flags in (_TE, _FP8))
    high_end, low_end = (sum(losses[-10:]) / 10 for losses in (high, low))
    assert high_end < 2.0 < high[0]
    assert low_end < high_end + _MARGIN


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["recurrent_experts", "recurrent_moe"])
def test_a_run_resumes_where_it_was_saved(corpus: Path, tmp_path: Path, variant: str, backend: str) -> None:
    flags = f"--transformer-impl {backend} --train-iters 8"
    whole = _losses(corpus, variant, flags)
    saving = f"{flags} --save {tmp_path} --load {tmp_path} --save-interval 4"
    first = _losses(corpus, variant, f"{saving} --exit-interval 4")
    second = _losses(corpus, variant, saving)
    assert len(first) == len(second) == 4
    # Sums on a GPU come in varying order.
    assert first + second == pytest.approx(whole, rel=2e-3)


@pytest.mark.skipif(not has_package("transformer_engine"), reason="needs Transformer Engine")
def test_a_run_of_one_backend_is_resumed_by_the_other(corpus: Path, tmp_path: Path) -> None:
    flags = "--more-variant shared_block --train-iters 8"
    whole = _losses(corpus, "shared_block", f"{_TE} --train-iters 8")
    saving = f"{flags} --save {tmp_path} --load {tmp_path} --save-interval 4"
    first = _losses(corpus, "shared_block", f"{saving} --transformer-impl local --exit-interval 4")
    second = _losses(corpus, "shared_block", f"{saving} {_TE}")
    assert first + second == pytest.approx(whole, rel=1e-2)
