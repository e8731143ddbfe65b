"""What a user gets wrong ends with one line that says what and how to mend it, before any training step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.corpus import write_corpus
from tests.helpers.program import Ended, pretrain_more
from tests.helpers.training import TINY, TINY_ON_FILES

_UNIFORM = "--recurrence-sampling uniform"

FLAGS = {
    "--more-variant nonsense": "--more-variant nonsense does not exist: choose one of ",
    f"{_UNIFORM} --recurrence-min-steps 4 --recurrence-max-steps 2": "2 is below --recurrence-min-steps 4",
    "--recurrence-backprop-steps 0": "--recurrence-backprop-steps 0 must be at least 1",
    "--no-such-flag 3": "unrecognized arguments: --no-such-flag 3",
    "--num-layers four": "--num-layers: invalid int value: 'four'",
    "--optimizer magic": "--optimizer: invalid choice: 'magic'",
    "--num-layers 0": "--num-layers 0 must be at least 1",
    "--hidden-size 33": "--hidden-size 33 is not divisible by --num-attention-heads 4",
    "--group-query-attention --num-query-groups 3": "--num-attention-heads 4 is not divisible by --num-query-groups 3",
    "--moe-router-topk 5": "--moe-router-topk 5 is above --num-experts 4",
    "--moe-layer-freq ([1]*3)": "--moe-layer-freq names 3 layers, --num-layers is 4",
    "--moe-router-load-balancing-type sinkhorn": "give --moe-aux-loss-coeff 0",
    "--expert-model-parallel-size 3": "--num-experts 4 is not divisible by --expert-model-parallel-size 3",
    "--expert-model-parallel-size 2": "the number of ranks, 1, is not divisible by 2",
    "--tensor-model-parallel-size 2": "the number of ranks, 1, is not divisible by 2",
    "--max-position-embeddings 8": "--max-position-embeddings 8 is below --seq-length 16",
    "--context-parallel-size 1 --seq-length 0": "--seq-length 0 must be at least 1",
    "--transformer-impl transformer_engine": "Transformer Engine is not installed",
    "--distributed-backend nccl": "--distributed-backend nccl needs a GPU",
    "--cuda-graph-impl local": "--cuda-graph-impl local needs a GPU",
    "--fp8-format hybrid": "--fp8-format needs --transformer-impl transformer_engine",
    "--overlap-moe-expert-parallel-comm": "only supported with expert model parallelism",
    "--enable-bias-linear": "shared experts have no biases",
    "--enable-bias-linear --moe-shared-expert-intermediate-size 0": "needs --transformer-impl transformer_engine",
    "--optimizer sgd": "--no-use-distributed-optimizer",
    "--recompute-granularity full": "recompute_method",
    f"{_UNIFORM} --overlap-grad-reduce --recompute-granularity selective --recompute-modules moe": (
        "--more-variant recurrent_moe with --overlap-grad-reduce and --recompute-modules moe needs the same"
    ),
    "--multi-latent-attention": "--multi-latent-attention is not supported",
    "--save /tmp/somewhere": "--save needs --save-interval",
    "--tokenizer-type SentencePieceTokenizer": "needs --tokenizer-model",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model /no/such.model": "/no/such.model does not exist",
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such": "/no/such",
    "--rampup-batch-size 2 2 8": "--rampup-batch-size has no effect: give --step-batch-size-schedule",
    "--use-flash-attn": "--attention-backend flash",
    "--inference-max-requests 8": "--inference-max-requests has no effect in pretraining",
    "--rl-default-temperature 1.0": "--rl-default-temperature has no effect in pretraining",
    "--img-h 224": "--img-h has no effect in pretraining",
    "--use-checkpoint-args": "--use-checkpoint-args needs a checkpoint in --load",
    "--load /no/such/folder": "there is no checkpoint in --load /no/such/folder",
}


def refused(ended: Ended, *parts: str) -> None:
    """Assert that a rank ended with one line on standard error which holds `parts`."""
    assert ended.code == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("pretrain_more.py: error: ")]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("flags", FLAGS)
def test_wrong_flags(flags: str) -> None:
    refused(pretrain_more(1, f"{TINY} {flags}")[0], FLAGS[flags])


def test_one_line_from_all_ranks_together() -> None:
    first, second = pretrain_more(2, f"{TINY} --global-batch-size 7")
    refused(first, "(7)")
    assert second.stderr == ""


def test_missing_flags() -> None:
    refused(pretrain_more(1, "")[0], "--num-layers is missing")
    refused(pretrain_more(1, TINY_ON_FILES)[0], "there are no data to train on")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a dataset."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def _copy(corpus: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{folder / 'text'}{suffix}")
    return folder / "text"


def _on(prefix: Path, flags: str = "--split 90,10,0") -> Ended:
    return pretrain_more(1, f"{TINY_ON_FILES} --data-path {prefix} {flags}")[0]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_data(corpus: Path, tmp_path: Path, suffix: str) -> None:
    prefix = _copy(corpus, tmp_path)
    file = Path(f"{prefix}{suffix}")
    with open(file, "r+b") as stream:
        stream.truncate(60)
    refused(_on(prefix), str(file), "truncated")
    file.unlink()
    refused(_on(prefix), str(file), "does not exist")


def test_files_that_name_the_data(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "blend"
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        refused(pretrain_more(1, f"{TINY_ON_FILES} {flag} {file}")[0], flag, str(file), "cannot be read")
    file.write_text("  ")
    refused(pretrain_more(1, f"{TINY_ON_FILES} --data-args-path {file}")[0], "is empty")
    for content, part in (
        ("{", "is not JSON"),
        ("[]", "does not name the data"),
        (json.dumps({"valid": [str(corpus)]}), "does not name the data"),
        (json.dumps({"train": [str(corpus)], "validation": [str(corpus)]}), "does not name the data"),
        (json.dumps({"train": 3}), "does not name prefixes for train"),
    ):
        file.write_text(content)
        refused(pretrain_more(1, f"{TINY_ON_FILES} --per-split-data-args-path {file}")[0], str(file), part)


def test_data_without_validation_are_trained_on(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "blend"
    file.write_text(json.dumps({"train": f"0.3 {corpus} 0.7 {corpus}", "test": [str(corpus)]}))
    run = TINY_ON_FILES.replace("--eval-iters 0 --eval-interval 1000", "--eval-iters 1 --num-layers 1")
    [ended] = pretrain_more(1, f"{run} --per-split-data-args-path {file}")
    assert ended.code == 0, ended.stderr
    assert "> there are no validation data" in ended.stdout
    assert " test loss at iteration 6 on test set" in ended.stdout
    file.write_text(str(corpus))
    ended = pretrain_more(1, f"{run} --data-args-path {file} --split 100,0,0")[0]
    assert ended.code == 0, ended.stderr


def test_tokenizer_of_other_data(corpus: Path, tmp_path: Path) -> None:
    prefix = _copy(corpus, tmp_path)
    manifest = {"documents": 200, "tokenizer": {"type": "NullTokenizer", "vocab_size": 500}}
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    refused(_on(prefix), "500", "127")


def test_split_without_documents(corpus: Path, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few", documents=3)
    refused(_on(few, "--split 98,1,1"), "--split 98,1,1", "the validation set 0 of the 3 documents")
    # Without --split Megatron takes 969,30,1.
    refused(_on(corpus, ""), "the test set 0 of the 200 documents")
    refused(_on(corpus, "--split 0,100,0"), "leaves nothing for training")


def test_validation_split_below_one_sequence(tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few", documents=10)
    refused(_on(few, "--split 90,10,0 --full-validation --seq-length 512 --eval-iters 1"), "513 at least")


def test_index_cache_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    prefix = _copy(corpus, tmp_path)
    prefix.write_text("a file where Megatron makes a folder")
    refused(_on(prefix), "--data-cache-path")


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--data-cache-path"])
def test_output_folder_that_cannot_be_made(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    ended = pretrain_more(1, f"{TINY} --save-interval 2 {flag} {tmp_path / 'file' / 'below'}")[0]
    refused(ended, str(tmp_path / "file" / "below"), "Not a directory")


def test_platform_that_does_not_exist() -> None:
    environment = {"MORE_PLATFORM": "tpu"}
    ended = pretrain_more(1, TINY, environment=environment, prepare=_forget_platform)[0]
    refused(ended, "MORE_PLATFORM=tpu is not a platform")


def _forget_platform() -> None:
    from more_megatron.platform import initialize_platform

    initialize_platform.cache_clear()
