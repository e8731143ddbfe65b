"""A small corpus, tokenizers of every kind trained on it, and Megatron's own way of writing a dataset."""

import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess_wikitext.py"

MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True},
    "bpe_unknown": {"model_type": "bpe"},
    "bpe_kept_spaces": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "bpe_kept_unknown": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe_kept_nfkc": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe_no_prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "bpe_symbols": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "the", "ing\t", "é"]},
    "bpe_across": {"model_type": "bpe", "split_by_whitespace": False},
    "bpe_suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
    "bpe_case": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True},
    "unigram_kept_spaces": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "unigram_symbols": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<sep>", "the"]},
}


@functools.cache
def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """English documents with line breaks, indentation and runs of spaces."""
    return _topics()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Gives the path of a model of `MODELS`, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def path(name: str) -> str:
        model = io.BytesIO()
        sentences = [line for text in _topics()[::2] for line in text.split("\n") if line.strip()]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            **{"vocab_size": 1500, "minloglevel": 2, "num_threads": 2, "hard_vocab_limit": False, **MODELS[name]},
        )
        target = folder / f"{name}.model"
        target.write_bytes(model.getvalue())
        return str(target)

    return path


def write_like_megatron(
    prefix: str, documents: Sequence[str], encode: Callable[[str], list[int]], eod: int | None, dtype: type
) -> None:
    """Write a dataset one document at a time with Megatron's builder, as its tool does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids = list(encode(document))
        if ids and eod is not None:
            ids.append(eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def expected_tokens(
    documents: Sequence[str], encode: Callable[[str], list[int]], eod: int | None
) -> tuple[list[int], list[int]]:
    """Tokens and lengths of documents that are encoded one by one."""
    tokens: list[int] = []
    lengths = []
    for document in documents:
        ids = list(encode(document))
        ids += [eod] if ids and eod is not None else []
        tokens += ids
        lengths.append(len(ids))
    return tokens, lengths


def run_tool(*arguments: str | os.PathLike[str], tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    """Run a tool as its user does."""
    command = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that a tool ended with one clear line."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("training a", "encoding by"))]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]
