"""Checkpoints of tiny runs, converted there and back inside ranks."""

import contextlib
import io
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from more_megatron.systems import get_system, names
from tests.helpers.corpus import write_corpus
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY_ON_FILES, dense

SEQUENCES = 8
_LENGTH = 16
_VALIDATION = r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)"
_VOCABULARY = 126

_EP2, _TP2, _PP2 = (f"--{kind}-model-parallel-size 2" for kind in ("expert", "tensor", "pipeline"))
_TOP2 = "--moe-router-topk 2"

# Run: its system, its layout on two ranks, and what else differs from the others.
RUNS: dict[str, str] = {
    "moe, dp": "--more-variant moe",
    "moe, tp2, many features": (
        f"--more-variant moe {_TP2} {_TOP2} --moe-layer-freq [0,1] --normalization LayerNorm --qk-layernorm "
        "--group-query-attention --num-query-groups 2 --add-qkv-bias --tie-embeddings-and-output-weights "
        "--position-embedding-type learned_absolute --no-swiglu --moe-shared-expert-gate "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.5"
    ),
    "recurrent_moe, ep2": f"--more-variant recurrent_moe {_EP2} --router-logit-ema 0.5 --recurrence-residual-scale 0.5",
    "recurrent_moe, pp2": f"--more-variant recurrent_moe {_PP2} {_TOP2} --rotary-interleaved --rotary-percent 0.5",
    "recurrent_experts, tp2": f"--more-variant recurrent_experts {_TP2} --kv-channels 12",
    "recurrent_experts, ep2": f"--more-variant recurrent_experts {_EP2} {_TOP2} --recurrence-ffn-hidden-size 40",
    "shared_block, pp2": f"--more-variant shared_block {_PP2} --group-query-attention --num-query-groups 2",
    "shared_block, tp2": f"--more-variant shared_block {_TP2} {_TOP2}",
    "moeut, tp2": f"--more-variant moeut {_TP2} {_TOP2} --switchhead-num-experts 4 --rotary-percent 0.5",
    "moeut, ep2": f"--more-variant moeut {_EP2} {_TOP2} --switchhead-num-experts 1 --normalization LayerNorm",
    "shared_block_ffn, ep2": f"--more-variant shared_block_ffn {_EP2} --moe-shared-expert-intermediate-size 0",
    "loop, pp2": (
        f"--more-variant loop {_PP2} {_TOP2} --num-layers 4 --moe-layer-freq [1,0]*2 --router-logit-ema 0.5 "
        "--recurrence-prelude-layers 1 --recurrence-group-layers 1 --recurrence-injection linear"
    ),
    "huginn, tp2": f"--more-variant huginn {_TP2} --num-layers 4",
    "huginn, ep2": (
        f"--more-variant huginn {_EP2} {_TOP2} --num-layers 3 --recurrence-coda-layers 0 --recurrence-injection add"
    ),
    "shared_block_ffn, tp2": f"--more-variant shared_block_ffn {_TP2} {_TOP2} --normalization LayerNorm",
    "universal, tp2": f"--more-variant universal {_TP2} {_TOP2} --halting-output basic --router-logit-ema 0.5",
    "universal, pp2": (
        f"--more-variant universal {_PP2} --pipeline-model-parallel-layout Ett|L --moe-layer-freq [0,1] "
        "--universal-post-norm --universal-time-signal sinusoid --halting none"
    ),
    "gru_experts, ep2": f"--more-variant gru_experts {_EP2} {_TOP2}",
    "sequential_experts, tp2": f"--more-variant sequential_experts {_TP2}",
    "parallel_experts, tp2": f"--more-variant parallel_experts {_TP2} {_TOP2}",
}
# Systems that no run above is of.
for _name in names():
    if not any(f"--more-variant {_name} " in f"{_flags} " for _flags in RUNS.values()):
        RUNS[f"{_name}, tp2"] = f"--more-variant {_name} {_TP2}"
# Of these, what only the whole matrix tries: each system is in another run, and so is each layout (of ep2, what is no
# expert is data-parallel).
IN_MATRIX = (
    *("moe, dp", "recurrent_moe, pp2", "recurrent_experts, tp2", "shared_block, tp2", "moeut, ep2"),
    "shared_block_ffn, tp2",
)
_DENSE = (RUNS["huginn, tp2"],)
# The run whose arguments do not travel with the model: they are derived from its configuration.
WITHOUT_ARGUMENTS = "recurrent_moe, ep2"
_COMMON = f"{TINY_ON_FILES} --num-layers 2 --train-iters 2 --save-interval 2 --eval-iters 2"


@dataclass(frozen=True)
class Reported:
    """What one run reported."""

    losses: list[float]  # loss of each training step
    validation: float  # loss of the last evaluation, over all sequences of the validation file


def write_data(folder: Path) -> None:
    """Write a training corpus, and a validation file that is one document of `SEQUENCES` sequences."""
    write_corpus(folder / "train")
    builder = IndexedDatasetBuilder(f"{folder}/valid.bin", dtype=np.uint16)
    tokens = np.random.default_rng(1).integers(0, _VOCABULARY, SEQUENCES * _LENGTH + 1)
    builder.add_item(torch.from_numpy(tokens))
    builder.end_document()
    builder.finalize(f"{folder}/valid.idx")


def command_line(folder: Path, flags: str) -> str:
    """Return the flags of a run on that data."""
    data = f"--train-data-path {folder}/train --valid-data-path {folder}/valid --test-data-path {folder}/valid"
    system = get_system(flags.split()[1])
    own = "--recurrence-steps 3" if system.recurrent else ""
    if not system.unread(Namespace(untie_embeddings_and_output_weights=False)):
        own += " --init-method-std 0.2"
    common = dense(_COMMON) if flags in _DENSE else _COMMON
    return f"{common} {data} --data-cache-path {folder}/cache {own} {flags}"


def train_runs(lines: list[str]) -> list[Reported]:
    """Train once for each command line and return what was reported; complete on the last rank."""
    reports = []
    for line in lines:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            (history,) = train_all([line])
        found = re.findall(
            r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)", output.getvalue()
        )
        reports.append(Reported(history.losses, float(found[-1]) if found else float("nan")))
    return reports


def convert(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """Convert each run's checkpoint to Hugging Face, back, and there again, each way verified.

    Returns:
        For each run what the two first conversions said, what that to half precision said, and the loss of the model on
        the validation file.
    """
    from more_megatron.hf.conversion.export import to_hf
    from more_megatron.hf.conversion.importer import from_hf

    said = {}
    for name in names:
        place = folder / name
        lines = to_hf(place / "run", place / "hf", max_shard_size=50_000, verify=True, progress=False)
        if name == WITHOUT_ARGUMENTS:
            (place / "hf" / "megatron_args.json").unlink()
        lines += from_hf(place / "hf", place / "back", verify=True, progress=False)
        to_hf(place / "back", place / "again", tokenizer=name != WITHOUT_ARGUMENTS, progress=False)
        lines += to_hf(place / "run", place / "half", dtype="bfloat16", verify=True, progress=False)
        # Threads of a group must not meet the end of the interpreter.
        assert not torch.distributed.is_initialized()
        said[name] = [*lines, str(_loss(place / "hf", folder / "valid"))]
    return said


@torch.no_grad()
def _loss(model_folder: Path, prefix: Path) -> float:
    """Return the mean loss of a model over the sequences of a file of one document."""
    from more_megatron.hf.exported.modeling_more import MoREForCausalLM

    model = MoREForCausalLM.from_pretrained(model_folder).eval()
    dataset = IndexedDataset(str(prefix))
    tokens = torch.from_numpy(dataset[0].astype(np.int64))
    inputs, labels = tokens[:-1].view(SEQUENCES, _LENGTH), tokens[1:].view(SEQUENCES, _LENGTH)
    logits = model(inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
