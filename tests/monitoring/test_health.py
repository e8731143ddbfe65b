"""Runs that are watched: planted faults are named, healthy runs are left alone, and watching changes nothing."""

import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.training import training

from more_megatron.errors import MoREError
from more_megatron.monitoring.loss import LossHistory, depth_figures, record_depth_losses
from more_megatron.monitoring.ranges import findings, healthy_ranges
from more_megatron.monitoring.report import Report
from more_megatron.monitoring.watch import Key
from more_megatron.systems import get_system, names
from tests.helpers.program import finished, pretrain_more
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY, TINY_ON_FILES, History, dense
from tests.monitoring.faults import SPIKE, faulty_run, write_easy_corpus
from tests.monitoring.recorded import read_records

_SHORT = f"{TINY} --num-layers 2 --train-iters 4 --health-interval 1 --save-interval 99"
# Fault: the run it is planted in, and what the warning must say; of the report of the step after it where that is all
# that can be seen of it before.
_EXPECTED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "state ignored": (
        f"{dense(_SHORT)} --num-layers 3 --more-variant huginn",
        "the state is ignored",
        (
            "recurrence/second step is 0 in layer 2",
            "recurrence/adapter state norm is 0.0",
        ),
    ),
    "tokens alike": (
        f"{dense(_SHORT)} --num-layers 3 --more-variant huginn",
        "states of all tokens become alike",
        ("recurrence/token correlation is 1 in layer 2, healthy is at most 0.9",),
    ),
    "one expert takes all": (
        f"{_SHORT} --more-variant recurrent_moe --moe-router-topk 1",
        "one expert takes nearly all tokens",
        ("routing/largest load is 1 in layer 2, step", "expert 2", "routing/effective experts is 1 "),
    ),
    "dead expert": (
        f"{_SHORT} --more-variant moe --micro-batch-size 4 --global-batch-size 16",
        "experts receive no tokens",
        ("routing/dead experts is 1 in layer 2, expert 1, healthy is at most 0",),
    ),
}


def _faulty_runs(runs: dict[str, str]) -> dict[str, str | None]:
    return {fault: faulty_run(run, fault) for fault, run in runs.items()}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | None, list[dict]]]:
    """Return for each fault the error that ended the run and the reports of it."""
    folder = tmp_path_factory.mktemp("faults")
    easy = write_easy_corpus(folder / "easy")
    runs = {fault: run for fault, (run, *_) in _EXPECTED.items()}
    runs["NaN in an expert"] = f"{_SHORT} --more-variant recurrent_experts"
    learning = f"{TINY_ON_FILES} --data-path {easy} --split 1,0,0 --num-layers 2 --train-iters 15 --lr 1e-2"
    runs["corrupted batch"] = f"{dense(learning)} --more-variant loop --health-interval 5 --save-interval 99"
    (errors,) = run_ranks(
        1, _faulty_runs, {name: f"{run} --save {folder / name.replace(' ', '-')}" for name, run in runs.items()}
    )
    return {name: (errors[name], read_records(folder / name.replace(" ", "-"))) for name in runs}


@pytest.mark.parametrize("fault", _EXPECTED)
def test_faults_are_named(faulty: dict[str, tuple[str | None, list[dict]]], fault: str) -> None:
    error, records = faulty[fault]
    assert error is None
    _, hint, parts = _EXPECTED[fault]
    before = [warning for record in records[:2] for warning in record["warnings"]]
    after = [warning for record in records[2:4] for warning in record["warnings"]]
    for part in parts:
        assert not any(part in warning for warning in before), before
        assert any(part in warning for warning in after), after
    assert any(hint in warning for warning in records[2]["warnings"])


def test_the_first_module_that_is_not_finite(faulty: dict[str, tuple[str | None, list[dict]]]) -> None:
    error, records = faulty["NaN in an expert"]
    assert error is not None
    assert "iteration 3: " in error
    assert "the first module whose output is not finite is decoder.layers.1.mlp.experts.block, in call 1 of" in error
    assert "its parameter adapter is not finite, expert 2 of layer 2" in error
    assert "nothing was saved of it" in error
    assert len(records) == 2


def test_a_corrupted_batch_is_a_spike(faulty: dict[str, tuple[str | None, list[dict]]]) -> None:
    _, records = faulty["corrupted batch"]
    assert [record["iteration"] for record in records] == [5, 10, 15]
    spikes = [[warning for warning in record["warnings"] if "a spike" in warning] for record in records]
    assert spikes[:2] == [[], []]
    assert len(spikes[2]) == 1
    assert f"at iteration {SPIKE}, healthy is at most" in spikes[2][0]


def _watched_or_not(runs: dict[str, str]) -> dict[str, History]:
    original = training.train_step
    histories = dict(zip(runs, train_all(list(runs.values())), strict=True))
    assert training.train_step is original
    return histories


def _saved(folder: Path) -> list[torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(folder / "iter_0000003")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return [value for value in nested_values(state) if isinstance(value, torch.Tensor)]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    run = f"{TINY} --num-layers 2 --train-iters 3 --more-variant recurrent_moe --moe-router-topk 2 --save-interval 3"
    intervals = {"watched": 1, "not": 0}
    runs = {name: f"{run} --save {tmp_path / name} --health-interval {every}" for name, every in intervals.items()}
    (histories,) = run_ranks(1, _watched_or_not, runs)
    assert histories["watched"].losses == histories["not"].losses
    assert histories["watched"].grad_norms == histories["not"].grad_norms
    watched, others = (_saved(tmp_path / name) for name in runs)
    assert len(watched) == len(others) > 10
    assert all(torch.equal(*pair) for pair in zip(watched, others, strict=True))
    assert len(read_records(tmp_path / "watched")) == 3
    assert not (tmp_path / "not" / "health.jsonl").exists()


def test_a_stop_saves_first_and_the_run_goes_on(tmp_path: Path) -> None:
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text("loss/loss: [0, 1]\n")
    run = f"{TINY} --num-layers 2 --train-iters 4 --health-interval 2 --save {tmp_path} --load {tmp_path}"
    flags = f"--save-interval 99 --health-ranges {ranges}"
    [ended] = pretrain_more(1, f"{run} {flags} --health-stop any --tensorboard-dir {tmp_path / 'board'}")
    assert ended.code == 1
    assert "WARNING: health at iteration 2: loss/loss is 4.8" in ended.stdout
    assert "[--health-stop any ends the run at iteration 2]" in ended.stdout
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    finished(f"{run} {flags} --health-stop collapse")
    assert [record["iteration"] for record in read_records(tmp_path)] == [2, 4]
    _check_board(tmp_path / "board")


def _check_board(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"health/loss/loss", "health/routing/layer 1/entropy/step 1", "health/gradient/router norm"} <= set(
        tags["scalars"]
    )
    assert "health/routing/layer 2/load/step 1" in tags["histograms"]
    assert "health/routing/load" in tags["images"]
    histogram = events.Histograms("health/routing/layer 2/load/step 1")[0].histogram_value
    assert sum(histogram.bucket) == pytest.approx(1.0)


class _Writer:
    def __init__(self) -> None:
        self.content: dict[str, Any] = {}

    def log(self, content: dict[str, Any], iteration: int) -> None:
        """Write as Weights & Biases does."""
        self.content |= content


def test_weights_and_biases_gets_a_table_of_experts() -> None:
    loads = {Key("routing", "load", "layer 1", step): (np.array([0.75, 0.25]), np.array([0.6, 0.4])) for step in (1, 2)}
    report = Report(7, {Key("loss", "loss"): 2.0}, loads, {"layer 1": np.array([3.0, 4.0])}, [])
    writer = _Writer()
    report.write_to_wandb(writer)
    assert writer.content["health/loss/loss"] == 2.0
    table = writer.content["health/experts"]
    assert table.columns == ["layer", "step", "expert", "load", "probability", "gradient norm"]
    assert table.data[1] == ["layer 1", 1, 1, 0.25, 0.4, 4.0]
    assert writer.content["health/routing/layer 1/load/step 2"].histogram == [0.75, 0.25]


def _ranges(folder: Path, text: str | None = None, **kwargs: Any) -> dict:
    path = None
    if text is not None:
        path = folder / "ranges.yaml"
        path.write_text(text)
    flags = {"has_softmax_router": True, "repeats_router": False, **kwargs}
    return healthy_ranges({"system/gate": (0.1, None)}, path, **flags)


def _warned(ranges: dict, figures: dict[Key, float], experts: int = 8) -> list[str]:
    even = np.full(experts, 1 / experts)
    loads = {Key("routing", "load", "layer 1", step): (even, even) for step in (0, 1, 2)}
    return [finding.text.split(" is ")[0] for finding in findings(figures, ranges, loads)]


def test_ranges_scale_with_the_number_of_experts(tmp_path: Path) -> None:
    entropy, effective = (Key("routing", name, "layer 1") for name in ("entropy", "effective experts"))
    for experts in (8, 64):
        share = math.log(experts) / math.log(8)
        healthy = {entropy: 1.51 * share, effective: 6.1 * experts / 8}
        assert _warned(_ranges(tmp_path), healthy, experts) == []
        poor = {entropy: 1.49 * share, effective: 5.9 * experts / 8}
        assert _warned(_ranges(tmp_path), poor, experts) == ["routing/entropy", "routing/effective experts"]
        assert _warned(_ranges(tmp_path, has_softmax_router=False), poor, experts) == []
        # Of a repeated router the guide expects less.
        assert _warned(_ranges(tmp_path, repeats_router=True), {entropy: 1.21 * share}, experts) == []


def test_ranges_of_recurrences_that_inject(tmp_path: Path) -> None:
    flat = {Key("recurrence", "second step", "layer 1"): 0.0, Key("recurrence", "steps", "layer 1"): 32.0}
    assert _warned(_ranges(tmp_path), flat) == []
    assert _warned(_ranges(tmp_path), flat | {Key("recurrence", "distance to input", "layer 1"): 1.0}) == [
        "recurrence/second step"
    ]


def test_ranges_of_a_file(tmp_path: Path) -> None:
    figures = {Key("system", "gate"): 0.05, Key("routing", "load cv", "layer 1"): 0.4, Key("loss", "trend"): 3.0}
    assert _warned(_ranges(tmp_path), figures) == ["system/gate", "routing/load cv"]
    text = "system/gate: null\nrouting/load cv: [null, 0.5]\nloss/trend: [-1, 1]\n"
    assert _warned(_ranges(tmp_path, text), figures) == ["loss/trend"]
    for wrong, part in (
        ("- 1\n", "is no table of keys"),
        ("loss/trend: 3\n", "loss/trend must be"),
        ("loss/trend: [1, -1]\n", "loss/trend must be"),
        ("loss/trend: [.nan, 1]\n", "loss/trend must be"),
        ("routing/lod cv: [0, 1]\n", "did you mean routing/load cv"),
        ("a: [b", "cannot be read"),
        ("loss/trend: [-1, 1]\nloss/trend: [0, 1]\n", "loss/trend stands there twice"),
    ):
        with pytest.raises(MoREError, match=part):
            _ranges(tmp_path, wrong)


def test_a_loss_that_is_flat_in_depth(tmp_path: Path) -> None:
    record_depth_losses({1: 3.001, 4: 3.0, 8: 3.0005})
    figures = dict(depth_figures())
    assert figures[Key("depth", "loss", step=4)] == 3.0
    assert _warned(_ranges(tmp_path), figures) == ["depth/spread"]
    assert figures[Key("depth", "gain")] == pytest.approx(0.001)
    assert dict(depth_figures()) == {}
    # Steps that make it worse are read as well.
    for losses in ({1: 3.5, 4: 3.0}, {1: 3.0, 4: 3.01}):
        record_depth_losses(losses)
        assert _warned(_ranges(tmp_path), dict(depth_figures())) == []


def test_figures_of_the_loss() -> None:
    history = LossHistory()
    generator = np.random.default_rng(0)
    noise = generator.normal(0.0, 0.05, 1000)
    losses = 5.0 - 0.002 * np.arange(1000) + noise
    rates = np.linspace(1e-3, 1e-4, 1000)
    for step, loss in enumerate(losses):
        history.add(step + 1, torch.tensor(loss), 20.0 if step == 500 else 1.0, rates[step])
    assert history.settle() == []
    assert history.first_non_finite() is None
    figures = {key.tag: value for key, value in history.figures()}
    smooth = np.convolve(losses, np.ones(100) / 100, mode="valid")
    assert figures["loss/trend"] == pytest.approx(1000 * np.polyfit(np.arange(901), smooth, 1)[0], rel=1e-4)
    assert figures["loss/trend"] == pytest.approx(-2.0, rel=0.05)
    assert figures["loss/variation"] < 0.02
    assert figures["gradient/spikes"] == 1.0
    expected = np.corrcoef(rates[:-1], np.diff(losses))[0, 1]
    assert figures["loss/learning rate correlation"] == pytest.approx(expected, abs=1e-4)
    history.add(1001, torch.tensor(6.0), 1.0, 1e-4)
    history.add(1002, torch.tensor(math.nan), 1.0, 1e-4)
    [spike] = history.settle()
    assert spike.startswith("loss is 6 at iteration 1001, healthy is at most")
    assert history.first_non_finite() == 1002


def _text_corpus(prefix: Path) -> Path:
    """Write the reference of the Python language, a token a character, and return the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _, page in sorted(topics.items()):
        for paragraph in page.split("\n\n"):
            characters = [character for character in paragraph.encode() if character < 126]
            if len(characters) > 8:
                builder.add_item(torch.tensor(characters))
                builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


_HEALTHY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --ffn-hidden-size 128 "
    "--micro-batch-size 8 --global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 8 --train-iters 300 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--lr-warmup-iters 30 --attention-dropout 0 --hidden-dropout 0 --log-interval 100 --eval-iters 0 --split 1,0,0 "
    "--health-interval 50 --save-interval 999"
)
_EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"


@pytest.mark.matrix
@pytest.mark.parametrize("system", names())
def test_a_healthy_run_is_not_warned_of(system: str, tmp_path: Path) -> None:
    # As they come: without experts where they are not the default.
    experts = "" if "num_experts" in get_system(system).defaults else f"{_EXPERTS} --moe-z-loss-coeff 0.001"
    run = f"{_HEALTHY} {experts} {flags_of(system)} --data-path {_text_corpus(tmp_path / 'text')} --save {tmp_path}"
    run_ranks(1, train_all, [run])
    records = read_records(tmp_path)
    assert len(records) == 6
    # Soon after warm-up a figure may still be on its way; at one of six looks it may.
    warned = [record["warnings"] for record in records if record["warnings"]]
    assert len(warned) <= 1, warned
    assert [record["warnings"] for record in records[2:]] == [[]] * 4
