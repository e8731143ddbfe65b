"""What a user gets wrong ends with one line that says what and how to mend it, before any training step."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from more_megatron.errors import one_line
from more_megatron.evaluation.runs import forget_run, read_each_docstring_once
from more_megatron.platform import initialize_platform
from more_megatron.training.arguments import parse_arguments
from more_megatron.training.checkpoints import check_checkpoint
from more_megatron.training.data_checks import check_data
from more_megatron.training.model import model_config_from_args
from more_megatron.training.reporting import print_cost
from tests.helpers.corpus import write_corpus
from tests.helpers.program import Ended, finished, pretrain_more, refused
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, TINY_ON_FILES

_UNIFORM = "--recurrence-sampling uniform"

FLAGS = {
    "--more-variant nonsense": "--more-variant nonsense does not exist: choose one of ",
    f"{_UNIFORM} --recurrence-min-steps 4 --recurrence-max-steps 2": "2 is below --recurrence-min-steps 4",
    "--recurrence-backprop-steps 0": "--recurrence-backprop-steps 0 must be at least 1",
    "--recurrence-steps 3 --recurrence-backprop-steps 4": "no effect while it is above the 3 steps of the deepest",
    "--recurrence-steps 1000000000": "--recurrence-steps 1000000000 must be at least 1 and at most 10000",
    "--recurrence-curriculum 0:99999999": "--recurrence-curriculum 99999999 must be at least 1 and at most 10000",
    "--router-min-entropy 99": "--router-min-entropy 99.0 is above ln --num-experts",
    "--recurrence-residual-scale nan": "--recurrence-residual-scale nan",
    "--no-such-flag 3": "unrecognized arguments: --no-such-flag 3",
    "--num-laers 3": "unrecognized arguments: --num-laers 3; did you mean --num-layers?",
    "--bf16 true": "unrecognized arguments: true, more than --bf16 takes",
    "--adam-eps -1e-8": "--adam-eps -1e-08 must be above 0",
    "--num-layers four": "--num-layers: invalid int value: 'four'",
    "--optimizer magic": "--optimizer: invalid choice: 'magic'",
    "--exit-signal X": "--exit-signal: invalid value: 'X' (choose from SIGHUP",
    "--moe-layer-freq 1/0": "--moe-layer-freq: invalid value: '1/0'",
    "--hidden-size 33": "--hidden-size % --num-attention-heads == 0 must hold",
    "--kv-channels 15": "heads of an even width",
    "--group-query-attention --num-query-groups 3": "--num-attention-heads 4 is not divisible by --num-query-groups 3",
    "--moe-router-topk 5": "--moe-router-topk 5 is above --num-experts 4",
    "--moe-layer-freq ([1]*3)": "--moe-layer-freq names 3 layers, --num-layers is 4",
    "--moe-layer-freq [1,0,1,2]": "which says which layers have experts",
    "--moe-aux-loss-coeff 0.01 0.02": "more numbers than there are values of --moe-router-load-balancing-type",
    "--moe-layer-freq 0": "--moe-layer-freq 0 must be at least 1",
    "--expert-model-parallel-size 3": "expert model parallel",
    "--tensor-model-parallel-size 2": "world size (1) is not divisible",
    "--max-position-embeddings 8": "max_position_embeddings (8)",
    "--transformer-impl transformer_engine": "Transformer Engine is not installed",
    "--cuda-graph-impl local": "--cuda-graph-impl",
    "--fp8-format hybrid": "--fp8-format needs --transformer-impl transformer_engine",
    "--overlap-moe-expert-parallel-comm": "only supported with expert model parallelism",
    "--enable-bias-linear": "needs --transformer-impl transformer_engine",
    "--optimizer sgd": "--no-use-distributed-optimizer",
    "--recompute-granularity full": "recompute_method",
    f"{_UNIFORM} --overlap-grad-reduce --recompute-granularity selective --recompute-modules moe": (
        "--more-variant recurrent_moe with --overlap-grad-reduce and --recompute-modules moe needs the same"
    ),
    "--multi-latent-attention": "--multi-latent-attention is not supported",
    "--save /tmp/somewhere": "--save needs --save-interval",
    "--tokenizer-type SentencePieceTokenizer": "needs --tokenizer-model",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model /no/such.model": "/no/such.model does not exist",
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model /dev/null": "/dev/null does not exist, or is empty",
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such": "/no/such",
    "--rampup-batch-size 2 2 8": "--rampup-batch-size has no effect: give --step-batch-size-schedule",
    "--use-flash-attn": "--attention-backend flash",
    "--inference-max-requests 8": "--inference-max-requests has no effect in pretraining",
    "--rl-default-temperature 1.0": "--rl-default-temperature has no effect in pretraining",
    "--img-h 224": "--img-h has no effect in pretraining",
    "--use-checkpoint-args": "--use-checkpoint-args needs a whole checkpoint in --load",
    "--load /no/such/folder": "there is no checkpoint in --load /no/such/folder",
    "--pretrained-checkpoint /no/such": "there is no checkpoint in --pretrained-checkpoint /no/such",
    "--adlr-autoresume": "--adlr-autoresume is not supported",
    "--num-query-groups 2": "--num-query-groups needs --group-query-attention",
    "--min-lr 1": "--min-lr <= --lr must hold, where --min-lr is 1.0 and --lr is 0.001",
    "--start-weight-decay 0.5": "--start-weight-decay is None must hold, where --start-weight-decay is 0.5",
    "--lr-decay-style WSD --lr-wsd-decay-iters 7": "--lr-decay-style WSD needs --lr-wsd-decay-iters",
    "--bf16 --fp16": "--bf16 and --fp16 exclude each other",
    "--lr-warmup-iters 6": "--lr-warmup-iters 6 must be below --lr-decay-iters",
    "--train-samples 24": "--train-iters 6 and --train-samples 24 exclude each other",
    "--split a,b,c": "--split a,b,c must be up to three shares",
    "--split 0,0,0": "--split 0,0,0 must be up to three shares",
    "--mock-data": "the data are named twice",
    "--data-path": "a flag of data is empty",
    "--data-path -1 a 2 b": "the weight -1.0 of a blend of data must be above 0",
    "--data-path nan a 2 b": "the weight nan of a blend of data must be above 0",
    "--lr-warmup-init 1": "--lr-warmup-init 1.0 is above --lr 0.001",
    "--decoupled-lr 0.1 --decoupled-min-lr 0.5": "--decoupled-min-lr 0.5 is above --decoupled-lr 0.1",
    "--exit-signal-handler --exit-signal SIGKILL": "SIGKILL cannot be handled",
    "--moe-shared-expert-gate --moe-shared-expert-intermediate-size 0": "means no shared expert",
    "--attention-backend flash": "need --transformer-impl transformer_engine",
    "--profile": "--profile needs a GPU",
    "--profile --use-pytorch-profiler": "--use-pytorch-profiler needs --tensorboard-dir",
    "--inprocess-restart": "needs nvidia_resiliency_ext",
    "--log-progress": "--log-progress needs --save",
    "--straggler-ctrlr-port 99999": "must be at least 0 and at most 65535",
    "--skip-train": "--skip-train with --eval-iters 0 does nothing",
    "--finetune": "--finetune needs --load",
    "--ckpt-step 3": "--ckpt-step needs --load",
    "--yaml-cfg /dev/null": "--yaml-cfg must name all arguments of Megatron",
    "--async-save --ckpt-format torch": "--async-save needs --ckpt-format torch_dist",
    "--wandb-project more": "--wandb-project more needs --wandb-save-dir",
    "--dataloader-type external": "--dataloader-type external is not supported",
    "--save ''": "--save is empty: give it a value or leave it out",
    "--spec gpt": "must be two words",
    "--spec no.module name": "--spec no.module name cannot be imported",
    "--hidden-size 4000000": "B parameters would take",
}

# Numbers outside of their range, with the words of the range.
OUT_OF_RANGE = {
    "at least 1": (
        *("--num-layers 0", "--num-experts -1", "--seq-length 0", "--train-iters 0", "--kv-channels 0", "--seed -1"),
        *("--num-query-groups 0", "--ffn-hidden-size 0", "--recompute-num-layers 0", "--exit-interval 0"),
        *("--log-interval 0", "--save-interval 0", "--make-vocab-size-divisible-by 0", "--lr-decay-iters 0"),
    ),
    "at most": ("--num-layers 100000", "--train-iters 1000000000000000000", "--num-workers 100000"),
    "at least 0": (
        *("--weight-decay -1", "--num-workers -1", "--init-method-std -1", "--lr inf", "--lr nan", "--eval-iters -1"),
        *("--clip-grad -1", "--moe-aux-loss-coeff nan", "--moe-z-loss-coeff inf", "--min-lr -1"),
    ),
    "above 0": ("--rotary-base 0", "--moe-expert-capacity-factor -1", "--rotary-percent 2", "--adam-eps 0"),
    "below 1": ("--adam-beta1 1.5", "--attention-dropout 1", "--hidden-dropout -0.1", "--lr-warmup-fraction 2"),
}

# What the table lets through.
RIGHT = (
    *(
        "",
        "--lr 0",
        "--recurrence-sampling poisson-lognormal --recurrence-steps 2 --recurrence-backprop-steps 8",
        "--clip-grad 0",
        "--weight-decay 0",
        "--moe-aux-loss-coeff 0",
        "--moe-layer-freq 2",
        "--moe-layer-freq [0,1,1,0]",
        "--rotary-percent 0.5",
    ),
    *(
        "--manual-gc --manual-gc-interval 0",
        "--lr-warmup-iters 5",
        "--exit-signal SIGUSR1",
        "--split 100,0,0",
        "--fp16",
    ),
    *(
        "--moe-shared-expert-intermediate-size 0",
        "--window-size 4,0",
        "--moe-expert-capacity-factor 1.0",
        "--hidden-dropout 0",
    ),
)

# What Megatron refuses after the world has begun.
LATE = {
    "--decoder-first-pipeline-num-layers 5": "change --decoder-first-pipeline-num-layers or its kin",
    "--expert-model-parallel-size 2": "world_size (1) is not divisible",
    "--distributed-backend nccl": "no GPUs found",
    "--moe-router-load-balancing-type sinkhorn": "Sinkhorn routing does not support aux loss",
    "--window-size 4,0 --lr-wsd-decay-iters 0": "must be at least 1",
    "--eval-iters 10000000000 --eval-interval 1": "samples would take",
}


@pytest.fixture(scope="module")
def lines() -> dict[str, str | None]:
    """Return what the program says to each of the flags, None where it would train."""
    flags = [*FLAGS, *(flag for group in OUT_OF_RANGE.values() for flag in group), *RIGHT]
    return dict(zip(flags, run_ranks(1, _lines, flags)[0], strict=True))


def _lines(all_flags: list[str]) -> list[str | None]:
    """Do what the program does before it starts a world, for each of the flags."""
    read_each_docstring_once()
    found: list[str | None] = []
    for flags in all_flags:
        sys.argv = ["pretrain_more.py", *shlex.split(f"{TINY} {flags}")]
        try:
            args = parse_arguments(initialize_platform())
            model_config = model_config_from_args(args)
            check_data(args)
            check_checkpoint(args)
            print_cost(model_config.transformer, args)
            found.append(None)
        except Exception as error:
            found.append(one_line(error))
        forget_run()
    return found


@pytest.mark.parametrize("flags", FLAGS)
def test_wrong_flags(flags: str, lines: dict[str, str | None]) -> None:
    assert FLAGS[flags] in (lines[flags] or "it was taken")


@pytest.mark.parametrize("words", OUT_OF_RANGE)
def test_numbers_out_of_range(words: str, lines: dict[str, str | None]) -> None:
    for flags in OUT_OF_RANGE[words]:
        assert (lines[flags] or "it was taken").startswith(f"{flags} must be")
        assert words in (lines[flags] or "")


def test_what_is_right_is_taken(lines: dict[str, str | None]) -> None:
    assert [(flags, lines[flags]) for flags in RIGHT if lines[flags] is not None] == []


@pytest.mark.parametrize("flags", LATE)
def test_what_is_found_later(flags: str) -> None:
    refused(pretrain_more(1, f"{TINY} {flags}")[0], LATE[flags])


def test_a_failure_of_one_rank_alone_is_one_line_of_that_rank() -> None:
    first, second = pretrain_more(2, f"{TINY} --expert-model-parallel-size 2", prepare=_fail_on_rank_1)
    refused(second, "ZeroDivisionError at tests/training/test_refusals.py", "MORE_TRACEBACK=1")
    assert "error" not in first.stderr


def _fail_on_rank_1() -> None:
    import os

    from megatron.training import training

    if os.environ["RANK"] == "1":
        training.train_step = lambda *_, **__: 1 // 0


def test_one_line_from_all_ranks_together() -> None:
    first, second = pretrain_more(2, f"{TINY} --global-batch-size 7")
    refused(first, "(7)")
    assert second.stderr == ""


def test_missing_flags() -> None:
    refused(pretrain_more(1, "")[0], "--num-layers is missing")
    refused(pretrain_more(1, TINY_ON_FILES)[0], "there are no data to train on")
    refused(pretrain_more(1, TINY.replace("--vocab-size 127", ""))[0], "NullTokenizer needs --vocab-size")


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
    output = finished(f"{run} --per-split-data-args-path {file}")
    assert "> there are no validation data" in output
    assert " test loss at iteration 6 on test set" in output
    file.write_text(str(corpus))
    finished(f"{run} --data-args-path {file} --split 100,0,0")


def test_bad_ids_where_the_check_at_start_does_not_look(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "long", documents=10_000)
    tokens = np.memmap(f"{prefix}.bin", np.uint16)
    looked_at = np.zeros(len(tokens), bool)
    for start in np.linspace(0, len(tokens) - 4096, 64, dtype=np.int64):
        looked_at[start : start + 4096] = True
    # Of the rows that pad the vocabulary, and beyond them.
    for wrong in (127, 500):
        tokens[~looked_at] = wrong
        tokens.flush()
        refused(_on(prefix), f"a sample holds the token id {wrong}, and the vocabulary has 127", "inspect_dataset.py")


def test_several_validation_sets_and_a_test(corpus: Path, tmp_path: Path) -> None:
    """Each under its own name; the test set has another length than they."""
    short, long = (write_corpus(tmp_path / str(size), documents=size) for size in (4, 9))
    file = tmp_path / "blend"
    file.write_text(json.dumps({"train": [str(corpus)], "valid": [str(short), str(long)], "test": [str(short)]}))
    run = TINY_ON_FILES.replace("--eval-iters 0", "--eval-iters 3 --num-layers 1 --recurrence-eval-depths 1 2")
    run += f" --train-iters 1 --full-validation --per-split-data-args-path {file}"
    output = finished(f"{run} --multiple-validation-sets --validation-set-names short long")
    names = re.findall(r"^ (\S+) loss at iteration 1 on (\S+) set", output, re.MULTILINE)
    assert names == [("validation-short", "validation"), ("validation-long", "validation"), ("test", "test")]
    assert " evaluation at iteration 1 on test set with 2 recurrence steps | lm loss: " in output
    assert " test loss at iteration 1 on test set" in finished(run)


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
    says_so = "--save-interval without --save: this run saves nothing" in ended.stdout
    assert says_so == (flag == "--data-cache-path")  # Megatron opens the writer of TensorBoard before.


def test_platform_that_does_not_exist() -> None:
    environment = {"MORE_PLATFORM": "tpu"}
    ended = pretrain_more(1, TINY, environment=environment, prepare=_forget_platform)[0]
    refused(ended, "MORE_PLATFORM=tpu is not a platform")


def _forget_platform() -> None:
    from more_megatron.platform import initialize_platform

    initialize_platform.cache_clear()


def test_help_is_shown() -> None:
    [ended] = pretrain_more(1, "--help")
    assert ended.code == 0
    assert "--more-variant" in ended.stdout
    assert "--tensor-model-parallel-size" in ended.stdout


def test_a_node_whose_name_does_not_resolve() -> None:
    nowhere = {"MASTER_ADDR": "node0.invalid"}
    first, second = pretrain_more(2, TINY, environment=nowhere, prepare=_do_not_wait_for_names)
    refused(first, "the name 'node0.invalid' of MASTER_ADDR does not resolve")
    assert second.stderr == ""


def _do_not_wait_for_names() -> None:
    from more_megatron import lifetime

    lifetime._SECONDS_FOR_A_NAME = 1
