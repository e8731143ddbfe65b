"""The tokenizer of a run as files that `AutoTokenizer` reads, checked against the one of training."""

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from more_megatron.data.fast import HOSTILE_TEXTS
from more_megatron.data.tokenizers import (
    NULL_TYPES,
    SENTENCEPIECE_TYPES,
    TokenizerOptions,
    TokenizerType,
    build_megatron,
    is_direct_sentencepiece,
    load,
    open_sentencepiece,
    tokenizer_sha256,
)
from more_megatron.errors import MoREError
from more_megatron.hf.conversion.sentencepiece_tokenizer import write_sentencepiece

_OWN_FILES = (TokenizerType.HUGGINGFACE, TokenizerType.GPT2_BPE, TokenizerType.BERT_CASE, TokenizerType.BERT_LOWER)
_REMEDY = "--no-tokenizer leaves the tokenizer out"

_PAD = "<pad>"
_DRAWN_TEXTS = 2000
_SEED = 1


@dataclass(frozen=True)
class ExportedTokenizer:
    """What a model's configuration says of its tokenizer, and how its files are written."""

    bos_token_id: int | None = None  # token before a text
    eos_token_id: int | None = None  # token that ends a text
    pad_token_id: int | None = None  # token that fills up a batch
    # Writes the files into a folder and checks that they encode as training did; None if there are none
    write: Callable[[Path], None] | None = None


def plan_tokenizer(
    args: argparse.Namespace, rows: int, model: str | None = None, trust_remote_code: bool = False
) -> ExportedTokenizer:
    """Find the tokenizer of a run.

    Args:
        args: Arguments from the checkpoint.
        rows: Rows of the embedding.
        model: Where the tokenizer is now; None: where it was.
        trust_remote_code: Whether a tokenizer may run code of its own, whatever the checkpoint says.

    Raises:
        MoREError: If it is not there, is not that of the run, or cannot be expressed in files for `AutoTokenizer`.
    """
    if getattr(args, "tokenizer_type", None) is None:
        raise MoREError(f"the checkpoint does not say which tokenizer it was trained with: {_REMEDY}")
    trained = replace(TokenizerOptions.from_args(args), trust_remote_code=trust_remote_code)
    options = trained if model is None else replace(trained, tokenizer_model=model)
    kind = options.tokenizer_type
    if kind in NULL_TYPES:
        tokenizer = load(options)
        _check_size(options, tokenizer.vocab_size, rows)
        return ExportedTokenizer(tokenizer.eod, tokenizer.eod, tokenizer.eod)
    if kind not in (*SENTENCEPIECE_TYPES, *_OWN_FILES):
        raise MoREError(f"--tokenizer-type {kind} has no files for AutoTokenizer: {_REMEDY}")
    _check_place(options, is_asked=model is not None)
    _check_hash(args, trained, options)
    if kind in SENTENCEPIECE_TYPES:
        return _sentencepiece(options, rows, args.max_position_embeddings)
    return _huggingface(options, rows)


def _check_place(options: TokenizerOptions, is_asked: bool) -> None:
    """Check that the tokenizer is there; a checkpoint cannot make this download one."""
    name, is_of_hub = options.tokenizer_model, options.tokenizer_type == TokenizerType.HUGGINGFACE
    if options.tokenizer_type not in SENTENCEPIECE_TYPES and not is_of_hub:
        return
    if name is not None and os.path.exists(name):
        return
    is_path = name is None or os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if is_asked and is_of_hub and not is_path:
        return
    raise MoREError(
        f"the tokenizer of the run, {name}, is not there: name its place with --tokenizer-model, or {_REMEDY}"
    )


def _check_hash(args: argparse.Namespace, trained: TokenizerOptions, options: TokenizerOptions) -> None:
    """Check that the files are those that the run was trained with, as far as that is known."""
    expected = getattr(args, "tokenizer_sha256", None) or tokenizer_sha256(trained)
    found = tokenizer_sha256(options)
    if expected is not None and found is not None and expected != found:
        raise MoREError(
            f"--tokenizer-model {options.tokenizer_model} ({found[:12]}) is not the tokenizer that the run was trained "
            f"with ({expected[:12]}): name that one, or {_REMEDY}"
        )


def _check_size(options: TokenizerOptions, size: int, rows: int) -> None:
    if size > rows:
        raise MoREError(
            f"the tokenizer {options.tokenizer_model} has {size} tokens and the embedding {rows} rows: it is not that "
            f"of the run; name that one with --tokenizer-model, or {_REMEDY}"
        )


def _sentencepiece(options: TokenizerOptions, rows: int, max_length: int) -> ExportedTokenizer:
    if not is_direct_sentencepiece(options):
        raise MoREError(
            "SentencePiece with special tokens beside the model, or with "
            f"--no-tokenizer-sentencepiece-ignore-extra-whitespaces, has no files for AutoTokenizer: {_REMEDY}"
        )
    path, processor = Path(str(options.tokenizer_model)), open_sentencepiece(options)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    _check_size(options, len(pieces), rows)
    pad = _pad_id(processor, pieces, rows)
    pad_name = pieces[pad] if pad < len(pieces) else _PAD

    def write(folder: Path) -> None:
        write_sentencepiece(path, folder, max_length, pad_name)
        texts = (*HOSTILE_TEXTS, *_drawn([piece.replace("\u2581", " ") for piece in pieces]))
        _compare(open_tokenizer(folder, literal=True), texts, processor.encode, processor.decode)

    end = processor.eos_id() if processor.eos_id() >= 0 else None
    return ExportedTokenizer(end, end, pad, write)


def _pad_id(processor: Any, pieces: Sequence[str], rows: int) -> int:
    """Return the token that fills up a batch: not the end of a text, which collators would then not teach."""
    if processor.pad_id() >= 0:
        return int(processor.pad_id())
    if _PAD in pieces:
        return pieces.index(_PAD)
    return len(pieces) if len(pieces) < rows else int(processor.unk_id())


def _huggingface(options: TokenizerOptions, rows: int) -> ExportedTokenizer:
    config = Path(options.tokenizer_model or "") / "tokenizer_config.json"
    if not options.trust_remote_code and config.is_file() and "auto_map" in config.read_text():
        raise MoREError(f"the tokenizer {options.tokenizer_model} has code of its own: --trust-remote-code lets it run")
    megatron = build_megatron(options)
    inner: Any = megatron._tokenizer.tokenizer
    _check_size(options, len(inner), rows)
    if inner.pad_token is None and len(inner) < rows:
        # A new one, as the embedding has a row to spare.
        inner.add_special_tokens({"pad_token": _PAD})
    elif inner.pad_token is None:
        inner.pad_token = inner.unk_token or inner.eos_token

    def write(folder: Path) -> None:
        inner.save_pretrained(folder)
        # Batches end where their texts end, which generation needs.
        saved = folder / "tokenizer_config.json"
        saved.write_text(json.dumps({**json.loads(saved.read_text()), "padding_side": "left"}, indent=2) + "\n")
        tokenizer = open_tokenizer(folder, trust_remote_code=options.trust_remote_code)
        _compare(tokenizer, HOSTILE_TEXTS, megatron.tokenize, None)

    return ExportedTokenizer(inner.bos_token_id, inner.eos_token_id, inner.pad_token_id, write)


def _drawn(pieces: Sequence[str]) -> Iterable[str]:
    """Yield texts that hold many of the pieces, next to others than in ordinary texts."""
    generator = random.Random(_SEED)
    for _ in range(_DRAWN_TEXTS):
        yield "".join(generator.choices(pieces, k=generator.randint(1, 12)))


def open_tokenizer(folder: Path, literal: bool = False, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of an export.

    Args:
        folder: The export.
        literal: Whether names of special tokens in a text are text, as they were to SentencePiece in training.
        trust_remote_code: Whether it may run code of its own.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # It looks at the model's configuration first, and remarks that it leaves the code beside it alone.
    logging.set_verbosity_error()
    try:
        options = {"split_special_tokens": True} if literal else {}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    finally:
        logging.set_verbosity(verbosity)


def _compare(
    tokenizer: Any,
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str] | None,
) -> None:
    """Check that exported files encode, and decode, as the tokenizer of training does.

    Raises:
        MoREError: If they do not.
    """
    for text in texts:
        ids, expected = list(tokenizer(text, verbose=False)["input_ids"]), list(encode(text))
        differs = ids != expected
        if decode is not None and not differs and tokenizer.unk_token_id not in ids:
            differs = tokenizer.decode(ids) != decode(ids)
        if differs:
            raise MoREError(f"the tokenizer cannot be exported exactly, {text[:40]!r} has other tokens: {_REMEDY}")
