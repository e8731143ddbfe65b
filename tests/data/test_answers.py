"""Which tokens are the answer's, and what is said of masks that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from more_megatron.data.answers import (
    Exercise,
    answer_density,
    check_answers,
    has_answers,
    mask_prefix,
    task_names,
    write_answers,
)
from more_megatron.data.indexed import bin_path, read_index
from more_megatron.data.tokenizers import Tokenizer, TokenizerOptions, load
from more_megatron.errors import MoREError
from tools.prepare_tasks import main as prepare_tasks
from tools.preprocess_wikitext import main as preprocess

_NUMBERS = TokenizerOptions("NullTokenizer", vocab_size=127)
_EXERCISES = [Exercise("1 2 3 9", "1 2 3", "long"), Exercise("4 8 8", "4", "short"), Exercise("5 7", "5", "long")]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return the prefix of three problems."""
    write_answers(str(tmp_path / "problems"), _EXERCISES, load(_NUMBERS))
    return str(tmp_path / "problems")


def test_answers_and_what_ends_them_are_marked_with_their_task(prefix: str) -> None:
    assert has_answers(prefix)
    assert task_names(prefix) == ["long", "short"]
    mask = np.fromfile(bin_path(mask_prefix(prefix)), np.uint8)
    assert mask.tolist() == [0, 0, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1]
    check_answers(prefix)
    assert read_index(f"{mask_prefix(prefix)}.idx").lengths.tolist() == [5, 4, 3]
    # Of 12 tokens 9 are predicted.
    assert answer_density(prefix) == 7 / 9


def test_a_prompt_whose_last_token_goes_on_into_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = {"ab": [1, 2], "abc": [1, 3]}
    monkeypatch.setattr(
        "more_megatron.data.reference._Megatron.encode", lambda _, texts: [words[text.decode()] for text in texts]
    )
    tokenizer = Tokenizer(_NUMBERS, 9, 0, None)
    write_answers(str(tmp_path / "p"), [Exercise("abc", "ab", "one")], tokenizer)
    assert np.fromfile(bin_path(mask_prefix(tmp_path / "p")), np.uint8).tolist() == [0, 1, 1]


def test_masks_that_do_not_fit(prefix: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    write_answers(other, _EXERCISES[:2], load(_NUMBERS))
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{mask_prefix(other)}{suffix}").replace(f"{mask_prefix(prefix)}{suffix}")
    with pytest.raises(MoREError, match=r"problems_answers is not of the shape of .*problems, whose"):
        check_answers(prefix)


def test_masks_that_are_damaged(prefix: str) -> None:
    manifest = Path(f"{mask_prefix(prefix)}.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"tasks": ["long"]}))
    with pytest.raises(MoREError, match="answers of task 2, its manifest names 1 tasks"):
        check_answers(prefix)
    with open(bin_path(mask_prefix(prefix)), "r+b") as stream:
        stream.write(bytes(12))
    with pytest.raises(MoREError, match="marks no token"):
        check_answers(prefix)
    bin_path(mask_prefix(prefix)).unlink()
    with pytest.raises(MoREError, match=r"problems_answers.bin does not exist"):
        check_answers(prefix)


def test_a_tokenizer_must_end_documents(tmp_path: Path) -> None:
    tokenizer = Tokenizer(_NUMBERS, 127, None, None)
    with pytest.raises(MoREError, match="no end-of-document token"):
        write_answers(str(tmp_path / "p"), _EXERCISES, tokenizer)


def test_the_tool_writes_problems_and_datasets(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Question: What is 12 + 345? Answer: 0 1 2 3 4 5 6 7 8 9 - You have apples. How many?\n" * 300)
    model = tmp_path / "tokenizer.model"
    flags = f"--input {text} --layout plain --output-prefix {tmp_path / 'text'} --train-tokenizer --vocab-size 310"
    preprocess(f"{flags} --tokenizer-model {model} --no-progress".split())
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}"
    for name in ("one", "two"):
        prepare_tasks(
            f"arithmetic --train 40 --test 10 --beyond 5 --output-prefix {tmp_path / name} {tokenizer}".split()
        )
    for split, count in (("train", 40), ("test", 10), ("beyond", 5)):
        prefix = f"{tmp_path / 'one'}_{split}_document"
        check_answers(prefix)
        assert read_index(f"{prefix}.idx").sequence_count == count
        assert set(task_names(prefix)) <= {"arithmetic", "word_problems"}
        for suffix in (".jsonl", "_document.bin", "_document_answers.bin"):
            first, second = (Path(f"{tmp_path / name}_{split}{suffix}").read_bytes() for name in ("one", "two"))
            assert first == second, suffix
