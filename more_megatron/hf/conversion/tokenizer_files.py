"""The tokenizer of a run as files that `AutoTokenizer` reads, checked against the one of training."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from more_megatron.data.tokenizers import (
    SENTENCEPIECE_TYPES,
    TokenizerOptions,
    TokenizerType,
    build_megatron,
    load,
)
from more_megatron.errors import MoREError
from more_megatron.hf.conversion.sentencepiece_tokenizer import write_sentencepiece

__all__ = ["ExportedTokenizer", "open_tokenizer", "plan_tokenizer"]

_HUGGINGFACE_TYPES = (
    TokenizerType.HUGGINGFACE,
    TokenizerType.GPT2_BPE,
    TokenizerType.BERT_CASE,
    TokenizerType.BERT_LOWER,
)
_NULL_TYPES = (TokenizerType.NULL, TokenizerType.NULL_MULTIMODAL)
_REMEDY = "--no-tokenizer leaves the tokenizer out"

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre actor .\n",
    "In 2008 , he starred in <unk> , </s> at the @-@ 1,234.5 @,@ 6789 km/h <s> mark .",
    "def f(x):\n\treturn [x ** 2 for x in range(10)]\n\n\nprint(f(3))",
    "  two spaces before,   three between, one behind ",
    "na\u00efve caf\u00e9 \u2013 \u201cquoted\u201d \u2026 Stra\u00dfe, \u0130stanbul",
    "\u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac, \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u306e\u6587 \ud55c\uad6d\uc5b4",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00a9\u2122 \u00bd \u2212273.15 \u00b0C",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa ------------------- ......... !!!!!!! 00000000 ======",
    "x",
    "",
)
_DRAWN_TEXTS = 2000
_SEED = 1


@dataclass(frozen=True)
class ExportedTokenizer:
    """What a model's configuration says of its tokenizer, and how its files are written.

    Attributes:
        vocab_size: Number of tokens, without padding.
        bos: Token before a text.
        eos: Token that ends a text.
        pad: Token that fills up a batch.
        write: Writes the files into a folder and checks that they encode as training did; None if there are none.
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    write: Callable[[Path], None] | None


def plan_tokenizer(args: argparse.Namespace, model: str | None) -> ExportedTokenizer:
    """Find the tokenizer of a run.

    Args:
        args: Arguments from the checkpoint.
        model: Where the tokenizer is now; None: where it was.

    Raises:
        MoREError: If it is not there, or cannot be expressed in files for `AutoTokenizer`.
    """
    if getattr(args, "tokenizer_type", None) is None:
        raise MoREError(f"the checkpoint does not say which tokenizer it was trained with: {_REMEDY}")
    options = TokenizerOptions.from_args(args)
    if model is not None:
        options = replace(options, tokenizer_model=model)
    kind = options.tokenizer_type
    if kind in SENTENCEPIECE_TYPES:
        return _sentencepiece(options, args.max_position_embeddings)
    if kind in _HUGGINGFACE_TYPES:
        return _huggingface(options)
    if kind in _NULL_TYPES:
        tokenizer = load(options)
        return ExportedTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.eod, tokenizer.eod, None)
    raise MoREError(f"--tokenizer-type {kind} has no files for AutoTokenizer: {_REMEDY}")


def _sentencepiece(options: TokenizerOptions, max_length: int) -> ExportedTokenizer:
    import sentencepiece

    path = Path(_existing(options))
    if options.tokenizer_sentencepiece_legacy or options.special_tokens or options.metadata_path:
        raise MoREError(f"SentencePiece with special tokens beside the model has no files for AutoTokenizer: {_REMEDY}")
    if not options.tokenizer_sentencepiece_ignore_extra_whitespaces:
        raise MoREError(
            "--no-tokenizer-sentencepiece-ignore-extra-whitespaces has no counterpart in files for AutoTokenizer: "
            + _REMEDY
        )
    tokenizer = load(options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pad = processor.pad_id() if processor.pad_id() >= 0 else tokenizer.eod

    def write(folder: Path) -> None:
        write_sentencepiece(path, folder, max_length)
        pieces = [processor.id_to_piece(index).replace("\u2581", " ") for index in range(processor.get_piece_size())]
        _compare(folder, (*_TEXTS, *_drawn(pieces)), processor.encode, processor.decode)

    return ExportedTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.eod, pad, write)


def _huggingface(options: TokenizerOptions) -> ExportedTokenizer:
    if options.tokenizer_type == TokenizerType.HUGGINGFACE and _is_path(options.tokenizer_model):
        _existing(options)
    megatron = build_megatron(options)
    inner: Any = megatron._tokenizer.tokenizer

    def write(folder: Path) -> None:
        inner.save_pretrained(folder)
        _compare(folder, _TEXTS, megatron.tokenize, None)

    return ExportedTokenizer(len(inner), inner.bos_token_id, inner.eos_token_id, inner.pad_token_id, write)


def _is_path(name: str | None) -> bool:
    return name is not None and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1)


def _existing(options: TokenizerOptions) -> str:
    path = options.tokenizer_model
    if path is None or not os.path.exists(path):
        raise MoREError(
            f"the tokenizer of the run, {path}, is not there: name its place with --tokenizer-model, or {_REMEDY}"
        )
    return path


def _drawn(pieces: Sequence[str]) -> Iterable[str]:
    """Yield texts that hold many of the pieces, next to others than in ordinary texts."""
    generator = random.Random(_SEED)
    for _ in range(_DRAWN_TEXTS):
        yield "".join(generator.choices(pieces, k=generator.randint(1, 12)))


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of an export."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # It looks at the model's configuration first, and remarks that it leaves the code beside it alone.
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def _compare(
    folder: Path,
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str] | None,
) -> None:
    """Check that the files encode, and decode, as the tokenizer of training does.

    Raises:
        MoREError: If they do not.
    """
    tokenizer = open_tokenizer(folder)
    for text in texts:
        ids, expected = list(tokenizer(text)["input_ids"]), list(encode(text))
        differs = ids != expected
        if decode is not None and not differs and tokenizer.unk_token_id not in ids:
            differs = tokenizer.decode(ids) != decode(ids)
        if differs:
            raise MoREError(f"the tokenizer cannot be exported exactly, {text[:40]!r} has other tokens: {_REMEDY}")
