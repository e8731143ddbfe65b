#!/usr/bin/env python
"""Cost of preprocessing against a pool that encodes documents one by one, on text that repeats and text that does not.

Both sides run as fresh processes in turn, write the same files, and are measured in CPU-seconds of all their processes
and in wall time. The unique text is docstrings and source files of this Python installation, each once; the repeated
text is articles drawn again and again, which flatters whatever remembers words.
"""

import argparse
import ast
import io
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.reading import read_all_documents
from more_megatron.data.sources import open_source
from more_megatron.data.tokenizers import TokenizerOptions, build_megatron, load
from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.flags import check_ranges
from tools.sample_text import write_sample_text

_TOOL = Path(__file__).with_name("preprocess_wikitext.py")
_CHUNK = 32
_SHORTEST = 200
_TRAINING_BYTES = 8_000_000
_ROW = "{:<9} {:<15} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}"
_KEEPING = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}


class Corpus(StrEnum):
    """Texts to measure on."""

    UNIQUE = "unique"
    REPEATED = "repeated"


SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "bpe-8k": {"model_type": "bpe", "vocab_size": 8000, "byte_fallback": True},
    "bpe-32k": {"model_type": "bpe", "vocab_size": 32000, "byte_fallback": True},
    "bpe-32k-keeping": {"model_type": "bpe", "vocab_size": 32000, "byte_fallback": True, **_KEEPING},
    "unigram-8k": {"model_type": "unigram", "vocab_size": 8000},
}
KINDS = (*SENTENCEPIECE, "byte-level", "wordpiece")


@dataclass(frozen=True)
class Cost:
    """What a process and its children took."""

    cpu: float
    wall: float


def unique_documents() -> Iterator[str]:
    """Yield the docstrings and source files of the Python installation in an order without system, each text once."""
    paths = sysconfig.get_paths()
    files = sorted({file for name in ("stdlib", "purelib") for file in Path(paths[name]).rglob("*.py")})
    random.Random(0).shuffle(files)
    seen = set()
    for file in files:
        try:
            source = file.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
        for text in [*texts, source]:
            if len(text) >= _SHORTEST and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def repeated_documents(path: str) -> Iterator[str]:
    """Yield the articles of a file in random order, without end."""
    documents = [text.decode() for text in read_all_documents([open_source(path)])]
    choose = random.Random(0)
    while True:
        yield choose.choice(documents)


def write_corpus(documents: Iterator[str], path: Path, megabytes: float) -> float:
    """Write JSON lines up to a size and return the megabytes there are."""
    size = 0
    with open(path, "w", encoding="utf-8") as stream:
        for document in documents:
            size += stream.write(json.dumps({"text": document}) + "\n")
            if size >= megabytes * 1e6:
                break
    return size / 1e6


def make_tokenizer(kind: str, corpus: Path, folder: Path) -> TokenizerOptions:
    """Train a tokenizer of a kind on the beginning of a corpus, with its library's usual settings."""
    with open(corpus, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream.readlines(_TRAINING_BYTES)]
    if kind not in SENTENCEPIECE:
        return _train_tokenizers(kind, texts, folder / kind)
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model,
        hard_vocab_limit=False,
        max_sentence_length=1 << 16,
        minloglevel=2,
        **SENTENCEPIECE[kind],
    )
    path = folder / f"{kind}.model"
    path.write_bytes(model.getvalue())
    return TokenizerOptions("SentencePieceTokenizer", str(path))


def _train_tokenizers(kind: str, texts: list[str], folder: Path) -> TokenizerOptions:
    import tokenizers
    import transformers

    end = "<|endoftext|>"
    settings: dict[str, Any] = {"vocab_size": 32000, "special_tokens": [end, "[UNK]"], "show_progress": False}
    trainer: Any
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=byte_level.alphabet(), **settings)
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(**settings)
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return TokenizerOptions("HuggingFaceTokenizer", str(folder))


def measure(command: list[str]) -> Cost:
    """Run a command and return its cost.

    Raises:
        MoREError: It failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if result.returncode:
        raise MoREError(f"a measured run failed: {result.stderr.strip().splitlines()[-1:]}")
    return Cost(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def compare(corpus: Path, options: TokenizerOptions, folder: Path, workers: int, runs: int) -> list[tuple[Cost, Cost]]:
    """Measure both sides in turn and check that their files are the same.

    Returns:
        The cost of our tool and of the pool in each of the paired runs.

    Raises:
        MoREError: A run failed, or the files differ.
    """
    model = [options.tokenizer_type, str(options.tokenizer_model)]
    ours = [sys.executable, str(_TOOL), "--input", str(corpus), "--output-prefix", str(folder / "ours")]
    ours += ["--tokenizer-type", model[0], "--tokenizer-model", model[1], "--workers", str(workers), "--no-progress"]
    theirs = [sys.executable, __file__, "--one-by-one", str(corpus), *model, str(folder / "theirs"), str(workers)]
    costs = [(measure(ours), measure(theirs)) for _ in range(runs)]
    for end in (".bin", ".idx"):
        if len({(folder / f"{side}_text_document{end}").read_bytes() for side in ("ours", "theirs")}) > 1:
            raise MoREError(f"the {end} files of both sides differ; please report this")
    return costs


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


def _encode_line(line: str) -> list[int]:
    ids = list(_encode(json.loads(line)["text"]))
    return [*ids, _end] if ids else ids


def run_one_by_one(corpus: str, options: TokenizerOptions, prefix: str, workers: int) -> None:
    """Encode documents one by one in a pool and write them with Megatron's builder, as its tool does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=DType.optimal_dtype(load(options).vocab_size))
    with multiprocessing.Pool(workers, _start_one_by_one, (options,)) as pool, open(corpus, encoding="utf-8") as lines:
        for ids in pool.imap(_encode_line, lines, _CHUNK):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}_text_document.idx")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", metavar="FILE", help="articles for the repeated text (default: Python's documentation)"
    )
    parser.add_argument("--megabytes", type=float, default=50.0, help="JSON lines of each text (default: 50)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="paired runs (default: 5)")
    corpora = [corpus.value for corpus in Corpus]
    parser.add_argument(
        "--corpora", nargs="+", choices=corpora, default=corpora, metavar="TEXT", help=", ".join(corpora)
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--one-by-one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    with one_line_errors(Path(__file__).name):
        if args.one_by_one:
            corpus, kind, model, prefix, workers = args.one_by_one
            run_one_by_one(corpus, TokenizerOptions(kind, model), prefix, int(workers))
        else:
            with tempfile.TemporaryDirectory() as folder:
                _measure_all(args, Path(folder))
    return 0


def _measure_all(args: argparse.Namespace, folder: Path) -> None:
    check_ranges(args, {"megabytes": "(0, inf)", "runs": "[1, inf)", "workers": "[1, inf)"})
    source = args.input or str(folder / "articles.txt")
    if args.input is None:
        write_sample_text(source)
    open(source).close()  # Before minutes of work on another text.
    print(f"{args.workers} workers, medians of {args.runs} paired runs; x: one by one over ours")
    print(_ROW.format("text", "tokenizer", "CPU-s", "theirs", "wall s", "theirs", "CPU x", "wall x"))
    for name in args.corpora:
        corpus = folder / f"{name}.jsonl"
        documents = unique_documents() if name == Corpus.UNIQUE else repeated_documents(source)
        size = write_corpus(documents, corpus, args.megabytes)
        if size < args.megabytes:
            print(f"this Python installation has {size:.0f} MB of text, less than --megabytes")
        for kind in args.kinds:
            costs = compare(corpus, make_tokenizer(kind, corpus, folder), folder, args.workers, args.runs)
            columns = zip(*((ours.cpu, theirs.cpu, ours.wall, theirs.wall) for ours, theirs in costs), strict=True)
            ratios = [median(theirs.cpu / ours.cpu for ours, theirs in costs)]
            ratios.append(median(theirs.wall / ours.wall for ours, theirs in costs))
            figures = [f"{median(column):.2f}" for column in columns] + [f"{ratio:.1f}" for ratio in ratios]
            print(_ROW.format(name, kind, *figures), flush=True)


if __name__ == "__main__":
    sys.exit(main())
