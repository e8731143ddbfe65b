"""Speed of preprocessing against encoding documents one by one, measured in fresh processes."""

import io
import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from more_megatron.data.detokenize import Detokenize
from more_megatron.data.errors import DataError
from more_megatron.data.preprocess import Job, preprocess
from more_megatron.data.progress import Progress
from more_megatron.data.sources import open_source
from more_megatron.data.tasks import plan_tasks, read_batches
from more_megatron.data.tokenizers import TokenizerOptions, build_megatron, load

__all__ = ["Kind", "Side", "Timing", "compare", "make_corpus", "make_tokenizer", "run_side"]

_CHUNK = 32


class Kind(StrEnum):
    """Tokenizers to measure with."""

    BPE_8K = "bpe-8k"
    BPE_32K = "bpe-32k"
    UNIGRAM_8K = "unigram-8k"
    BYTE_LEVEL = "byte-level"
    WORDPIECE = "wordpiece"


class Side(StrEnum):
    """What is measured."""

    OURS = "ours"
    ONE_BY_ONE = "one-by-one"


@dataclass(frozen=True)
class Timing:
    """Medians of one side.

    Args:
        seconds: the whole process, start of Python included.
        steady: MB/s over the second half of the input, when all processes run and have seen most words.
        tokens: tokens written.
    """

    seconds: float
    steady: float
    tokens: int


def make_corpus(source: str, path: Path, megabytes: float) -> None:
    """Write JSON lines of a given size from the documents of a file, in random order and repeated as needed.

    Args:
        source: any input of the preprocessing tool.
        path: the file to write.
        megabytes: its size.
    """
    opened = open_source(source, "text", None)
    documents = [
        document.decode()
        for task in plan_tasks([opened], 1 << 24)
        for batch in read_batches(task, Detokenize.NONE)
        for document in batch.documents
    ]
    choose = random.Random(0)
    size = 0
    with open(path, "w", encoding="utf-8") as stream:
        while size < megabytes * 1e6:
            size += stream.write(json.dumps({"text": choose.choice(documents)}) + "\n")


def make_tokenizer(kind: Kind, source: str, folder: Path) -> TokenizerOptions:
    """Train a tokenizer of a kind on a text, with SentencePiece's usual settings or the tokenizers library's."""
    text = Path(source).read_text("utf-8")
    if kind in (Kind.BYTE_LEVEL, Kind.WORDPIECE):
        return _train_tokenizers(kind, text, folder / kind)
    import sentencepiece

    size = {Kind.BPE_8K: 8000, Kind.BPE_32K: 32000, Kind.UNIGRAM_8K: 8000}[kind]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in text.split("\n") if line.strip()),
        model_writer=model,
        model_type="unigram" if kind is Kind.UNIGRAM_8K else "bpe",
        vocab_size=size,
        byte_fallback=kind is not Kind.UNIGRAM_8K,
        hard_vocab_limit=False,
        max_sentence_length=1 << 16,
        minloglevel=2,
    )
    path = folder / f"{kind}.model"
    path.write_bytes(model.getvalue())
    return TokenizerOptions("SentencePieceTokenizer", str(path))


def _train_tokenizers(kind: Kind, text: str, folder: Path) -> TokenizerOptions:
    import tokenizers
    import transformers

    end = "<|endoftext|>"
    settings: dict[str, Any] = {"vocab_size": 32000, "special_tokens": [end, "[UNK]"], "show_progress": False}
    trainer: Any
    if kind is Kind.BYTE_LEVEL:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=byte_level.alphabet(), **settings)
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(**settings)
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return TokenizerOptions("HuggingFaceTokenizer", str(folder))


def compare(
    script: str, corpus: Path, options: TokenizerOptions, folder: Path, workers: int, runs: int
) -> dict[Side, Timing]:
    """Measure both sides in turn and check that their files are the same.

    Args:
        script: command line tool that runs one side when told to.
        corpus: JSON lines.
        options: the tokenizer.
        folder: where to write.
        workers: processes of each side.
        runs: runs of each side, one after the other in pairs.

    Returns:
        The medians.

    Raises:
        DataError: a run failed, or the files differ.
    """
    found: dict[Side, list[tuple[float, dict[str, Any]]]] = {side: [] for side in Side}
    for _ in range(runs):
        for side in Side:
            found[side].append(_time_side(script, side, corpus, options, folder / side, workers))
    for end in (".bin", ".idx"):
        if len({Path(f"{folder / side}_text_document{end}").read_bytes() for side in Side}) > 1:
            raise DataError(f"the {end} files of both sides differ; please report this")
    return {
        side: Timing(
            median(seconds for seconds, _ in rows), median(row["steady"] for _, row in rows), rows[0][1]["tokens"]
        )
        for side, rows in found.items()
    }


def _time_side(
    script: str, side: Side, corpus: Path, options: TokenizerOptions, prefix: Path, workers: int
) -> tuple[float, dict[str, Any]]:
    arguments = [side, str(corpus), options.tokenizer_type, str(options.tokenizer_model), str(prefix), str(workers)]
    start = time.perf_counter()
    result = subprocess.run([sys.executable, script, "--run-side", *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise DataError(f"the run of {side} failed: {result.stderr.strip().splitlines()[-1:]}")
    return seconds, json.loads(result.stdout.splitlines()[-1])


def run_side(side: Side, corpus: str, options: TokenizerOptions, prefix: str, workers: int) -> dict[str, Any]:
    """Run one side in this process and say how fast it was once it ran."""
    if side is Side.OURS:
        return _run_ours(corpus, options, prefix, workers)
    return _run_one_by_one(corpus, options, prefix, workers)


class _Watch(Progress):
    """Notes when blocks arrive."""

    def __init__(self) -> None:
        super().__init__(None, show=False)
        self.marks: list[tuple[float, int]] = []

    def add(self, size: int, tokens: int) -> None:
        super().add(size, tokens)
        if size:
            self.marks.append((time.perf_counter(), self.size))


def _rate(marks: Sequence[tuple[float, int]]) -> float:
    """MB/s over the second half of what the marks tell of."""
    last, after = marks[-1]
    first, before = next(mark for mark in marks if mark[1] >= after / 2)
    return (after - before) / 1e6 / (last - first) if last > first else 0.0


def _run_ours(corpus: str, options: TokenizerOptions, prefix: str, workers: int) -> dict[str, Any]:
    watch = _Watch()
    source = open_source(corpus, "text", None)
    manifest = preprocess(Job(f"{prefix}_text_document", [source], load(options), workers=workers), watch)
    return {"steady": _rate(watch.marks), "tokens": manifest["tokens"]}


_encode: Callable[[str], list[int]]
_end: int


def _start_one_by_one(options: TokenizerOptions) -> None:
    global _encode, _end
    if options.tokenizer_type == "SentencePieceTokenizer":
        import sentencepiece

        processor: Any = sentencepiece.SentencePieceProcessor(model_file=options.tokenizer_model)
        _encode, _end = processor.encode_as_ids, processor.eos_id()
    else:
        megatron = build_megatron(options)
        _encode, _end = megatron.tokenize, megatron.eod


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = list(_encode(json.loads(line)["text"]))
    if ids:
        ids.append(_end)
    return ids, len(line)


def _run_one_by_one(corpus: str, options: TokenizerOptions, prefix: str, workers: int) -> dict[str, Any]:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=DType.optimal_dtype(load(options).vocab_size))
    marks: list[tuple[float, int]] = []
    size = tokens = 0
    with multiprocessing.Pool(workers, _start_one_by_one, (options,)) as pool, open(corpus, encoding="utf-8") as lines:
        results: Iterable[tuple[list[int], int]] = pool.imap(_encode_line, lines, _CHUNK)
        for ids, length in results:
            builder.add_document(ids, [len(ids)] if ids else [])
            size += length
            tokens += len(ids)
            marks.append((time.perf_counter(), size))
    builder.finalize(f"{prefix}_text_document.idx")
    return {"steady": _rate(marks), "tokens": tokens}
