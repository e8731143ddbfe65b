"""Rows of problems: whole ones, each once an epoch, with positions of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from more_megatron.data.answers import Exercise, write_answers
from more_megatron.data.tokenizers import TokenizerOptions, build_megatron, load
from more_megatron.errors import MoREError
from more_megatron.training.problem_datasets import AnswerDataset, ProblemDataset
from more_megatron.training.problems import NO_TASK, Problems, Tasks
from tests.helpers.corpus import write_corpus

_LENGTH = 16
_NUMBERS = TokenizerOptions("NullTokenizer", vocab_size=127)


def _dataset(prefix: Path, samples: int | None, split: Split = Split.train, length: int = _LENGTH) -> ProblemDataset:
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, split="1,0,0", tokenizer=build_megatron(_NUMBERS),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    kind = type("AnswerDataset", (AnswerDataset,), {"tasks": Tasks.of((str(prefix),))})
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    return kind(indexed, str(prefix), np.arange(len(indexed), dtype=np.int32), samples, split, config).rows


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of problems of 3 to 23 tokens, each with a first token of its own."""
    lengths = np.random.default_rng(0).integers(1, 11, 60)
    lengths[7] = 21
    exercises = [
        Exercise(" ".join(map(str, [number, *[99] * length, 100])), " ".join(map(str, [number, *[99] * length])), "one")
        for number, length in enumerate(lengths)
    ]
    path = tmp_path_factory.mktemp("problems") / "problems"
    write_answers(str(path), exercises, load(_NUMBERS))
    return path


def test_an_epoch_has_each_problem_that_fits_once(prefix: Path) -> None:
    dataset = _dataset(prefix, None)
    assert dataset.left_out == 1
    found = []
    for row in (dataset[index] for index in range(len(dataset))):
        starts = [int(start) for start, task in row["problems"] if task != NO_TASK]
        assert starts
        found += row["tokens"][starts].tolist()
        assert (row["position_ids"][starts] == 0).all()
        # An answer is a token and what ends it.
        assert int(row["loss_mask"].sum()) == 2 * len(starts)
        assert set(row["labels"][row["loss_mask"] > 0].tolist()) == {100, 126}
        filling = [int(start) for start, task in row["problems"] if task == NO_TASK and start < _LENGTH]
        assert len(filling) <= 1
        for start in filling:
            assert row["loss_mask"][start:].sum() == 0
            assert 99 in row["tokens"][start + 1 :] or start + 1 == _LENGTH
    assert sorted(found) == [number for number in range(60) if number != 7]


def test_rows_are_shuffled_by_the_seed_alone(prefix: Path) -> None:
    first, second = _dataset(prefix, 40), _dataset(prefix, 40)
    assert len(first) >= 40
    assert all(first[index]["tokens"].equal(second[index]["tokens"]) for index in range(40))
    assert first[0]["tokens"][0] != 0 or first[1]["tokens"][0] != 1
    assert _dataset(prefix, None, Split.valid)[0]["tokens"].equal(first[0]["tokens"])


def test_what_fills_up_a_batch_counts_nowhere(prefix: Path) -> None:
    row = _dataset(prefix, 4)[None]
    assert row["loss_mask"].sum() == 0
    assert (row["problems"][:, 1] == NO_TASK).all()


def test_no_problem_fits(prefix: Path) -> None:
    with pytest.raises(MoREError, match="no problem for the train set that fits into --seq-length 2"):
        _dataset(prefix, 4, length=2)


def test_plain_text_is_one_problem_a_row_and_counts(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    tasks = Tasks.of((str(text),))
    assert tasks == Tasks(("text",), frozenset({"text"}))
    row = _dataset(text, 4)[0]
    assert row["problems"].tolist() == [[0, 0], *[[_LENGTH, NO_TASK]] * 3]
    assert row["loss_mask"].sum() == _LENGTH


def test_answers_are_right_when_all_of_their_tokens_are() -> None:
    starts, tasks = torch.tensor([[0, 3, 6, 8]]), torch.tensor([[1, 1, 0, NO_TASK]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 0, 0]])
    right = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 0, 0]]) > 0
    losses = torch.arange(10.0).unsqueeze(0)
    report = Problems(starts, tasks, 10).report(Tasks(("a", "b", "c"), frozenset({"c"})), mask, losses, right)
    assert {name: value.tolist() for name, value in report.items()} == {
        "a loss": [7.0, 1.0],
        "a exact match": [1.0, 1.0],
        "b loss": [12.0, 4.0],
        "b exact match": [1.0, 2.0],
        "c loss": [0.0, 0.0],
    }
