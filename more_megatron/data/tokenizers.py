"""The tokenizer of a run: Megatron's types and options, its facts, and the fastest exact way to encode with it."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from more_megatron.data.bytelevel_words import ByteLevelWords, plan_byte_level
from more_megatron.data.encoding import Encoder, PlainEncoder
from more_megatron.data.errors import DataError
from more_megatron.data.indexed import token_dtype
from more_megatron.data.sentencepiece_words import (
    SentencePieceModel,
    SentencePieceWords,
    encode_whole,
    parse_model,
    plan_words,
    rounding_of_totals,
    unigram_lattice,
)
from more_megatron.data.unigram_words import UnigramEncoder, search_is_known
from more_megatron.data.wordencoder import CutRule, WordEncoder

__all__ = [
    "SENTENCEPIECE_TYPES",
    "Tokenizer",
    "TokenizerOptions",
    "TokenizerType",
    "build_decoder",
    "build_encoder",
    "build_megatron",
    "load",
    "tokenizer_sha256",
]


class TokenizerType(StrEnum):
    """Every type that Megatron's `build_tokenizer` knows."""

    SENTENCEPIECE = "SentencePieceTokenizer"
    GPT_SENTENCEPIECE = "GPTSentencePieceTokenizer"
    LLAMA2 = "Llama2Tokenizer"
    HUGGINGFACE = "HuggingFaceTokenizer"
    GPT2_BPE = "GPT2BPETokenizer"
    TIKTOKEN = "TikTokenizer"
    BERT_LOWER = "BertWordPieceLowerCase"
    BERT_CASE = "BertWordPieceCase"
    NULL = "NullTokenizer"
    SFT = "SFTTokenizer"
    MULTIMODAL = "MultimodalTokenizer"
    NULL_MULTIMODAL = "NullMultimodalTokenizer"


SENTENCEPIECE_TYPES = (TokenizerType.SENTENCEPIECE, TokenizerType.GPT_SENTENCEPIECE, TokenizerType.LLAMA2)
_PATHLESS_TYPES = (
    TokenizerType.GPT2_BPE,
    TokenizerType.BERT_LOWER,
    TokenizerType.BERT_CASE,
    TokenizerType.NULL,
    TokenizerType.NULL_MULTIMODAL,
    TokenizerType.MULTIMODAL,
)
_BY_WORDS = "words, each distinct one encoded once"
# The files of a tokenizer folder that decide its ids.
_FOLDER_FILES = ("*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class TokenizerOptions:
    """Megatron's tokenizer flags, under the names of its `TokenizerConfig`.

    Args:
        tokenizer_type: one of `TokenizerType`.
        tokenizer_model: file, folder or hub name.
        vocab_size: size for the types that need to be told.
        vocab_file: vocabulary of the types that take one.
        merge_file: merges of the types that take them.
        special_tokens: further special tokens.
        metadata_path: Megatron's tokenizer metadata.
        tiktoken_pattern: `v1` or `v2`.
        tiktoken_num_special_tokens: ids before the first ordinary token.
        tokenizer_sentencepiece_legacy: the wrapper's older behaviour.
        tokenizer_sentencepiece_ignore_extra_whitespaces: whether extra spaces are left to the model.
        tokenizer_hf_no_use_fast: whether to take the slow tokenizer.
        tokenizer_hf_no_include_special_tokens: whether to leave out the special tokens around a text.
        trust_remote_code: whether a hub tokenizer may run code of its own.
        null_tokenizer_eod_id: end-of-document id of the null tokenizer.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    special_tokens: tuple[str, ...] | None = None
    metadata_path: str | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    tokenizer_sentencepiece_legacy: bool = False
    tokenizer_sentencepiece_ignore_extra_whitespaces: bool = True
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False
    trust_remote_code: bool = False
    null_tokenizer_eod_id: int | None = None

    @classmethod
    def from_args(cls, args: Any) -> "TokenizerOptions":
        """Take the flags from parsed arguments, the trainer's or a tool's; absent ones keep their defaults."""
        flags = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        special = flags.get("special_tokens")
        return cls(**{**flags, "special_tokens": tuple(special) if special else None})


@dataclass(frozen=True)
class Tokenizer:
    """What a run needs to know of its tokenizer, small enough to hand to every worker.

    Args:
        options: the flags it was built from.
        vocab_size: number of ids, before Megatron's padding.
        eod: the id that Megatron's tokenizer answers as `.eod`.
        sha256: hash of its files, None for a tokenizer without files.
        method: how texts are encoded, in words.
        backend: serialized Hugging Face tokenizer, where one is used directly.
    """

    options: TokenizerOptions
    vocab_size: int
    eod: int | None
    sha256: str | None
    method: str
    backend: str | None = None

    @property
    def dtype(self) -> np.dtype:
        """dtype of the token ids on disk."""
        return token_dtype(self.vocab_size)


def load(options: TokenizerOptions) -> Tokenizer:
    """Read a tokenizer's facts.

    Args:
        options: the flags.

    Returns:
        The facts; Megatron, which takes seconds to import, is asked only for what is not SentencePiece.

    Raises:
        DataError: a flag is missing, or the tokenizer's files are missing or damaged.
    """
    kind = options.tokenizer_type
    if kind not in TokenizerType:
        raise DataError(f"--tokenizer-type {kind} is not known; choose one of {', '.join(TokenizerType)}")
    if kind not in _PATHLESS_TYPES and not options.tokenizer_model:
        raise DataError(f"--tokenizer-type {kind} needs --tokenizer-model")
    sha256 = tokenizer_sha256(options)
    if _is_direct_sentencepiece(options):
        return _load_sentencepiece(options, sha256)
    megatron = build_megatron(options)
    backend = _fast_backend(megatron, options)
    return Tokenizer(options, int(megatron.vocab_size), _eod(megatron), sha256, _backend_method(backend), backend)


def build_megatron(options: TokenizerOptions) -> Any:
    """Build Megatron's own tokenizer, as the trainer does.

    Raises:
        DataError: Megatron cannot build it.
    """
    build_tokenizer = _import_megatron()
    special = list(options.special_tokens) if options.special_tokens else None
    flags = {**asdict(options), "special_tokens": special}
    trainer_only = {
        "chat_template": None,
        "null_tokenizer_pad_id": None,
        "pad_vocab_size": False,
        "tokenizer_prompt_format": None,
        "image_tag_type": None,
        "force_system_message": False,
        "sft_tokenizer_prompt_format": "default",
        "rank": 0,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build_tokenizer(SimpleNamespace(**flags, **trainer_only))
    except Exception as error:
        what = options.tokenizer_model or options.vocab_file or options.tokenizer_type
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{options.tokenizer_type} cannot be built from {what}: {reason}") from error


def _import_megatron() -> Any:
    # Megatron's remarks on absent GPU libraries say nothing about text.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    return build_tokenizer


def build_encoder(tokenizer: Tokenizer, append_eod: bool) -> Encoder:
    """Build the fastest exact encoder for a tokenizer.

    Args:
        tokenizer: its facts.
        append_eod: whether documents end with the end-of-document token.
    """
    eod = tokenizer.eod if append_eod else None
    if _is_direct_sentencepiece(tokenizer.options):
        return _sentencepiece_encoder(tokenizer, eod)
    if tokenizer.backend is not None:
        return _backend_encoder(tokenizer, eod)
    megatron = build_megatron(tokenizer.options)
    return PlainEncoder(lambda texts: map(megatron.tokenize, texts), tokenizer.dtype, eod)


def build_decoder(options: TokenizerOptions) -> Callable[[list[int]], str]:
    """Build a function from token ids to text.

    Raises:
        DataError: the tokenizer's files are missing or damaged.
    """
    if _is_direct_sentencepiece(options) and options.tokenizer_model:
        processor = _open_sentencepiece(options.tokenizer_model)
        return lambda ids: str(processor.decode(ids))
    megatron = build_megatron(options)
    return lambda ids: str(megatron.detokenize(ids))


def tokenizer_sha256(options: TokenizerOptions) -> str | None:
    """Hash of the files that decide a tokenizer's ids.

    Args:
        options: the flags.

    Returns:
        SHA-256 of the model file, or of the names and contents of several; None if there is no local file.
    """
    files: list[Path] = []
    model = Path(options.tokenizer_model) if options.tokenizer_model else None
    if model is not None and model.is_dir():
        files += sorted({path for pattern in _FOLDER_FILES for path in model.glob(pattern) if path.is_file()})
    elif model is not None and model.is_file():
        files.append(model)
    files += [Path(name) for name in (options.vocab_file, options.merge_file) if name and os.path.isfile(name)]
    if not files:
        return None
    if len(files) == 1:
        return hashlib.sha256(files[0].read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_direct_sentencepiece(options: TokenizerOptions) -> bool:
    """Whether Megatron's wrapper hands the text to SentencePiece untouched."""
    return (
        options.tokenizer_type in SENTENCEPIECE_TYPES
        and not options.tokenizer_sentencepiece_legacy
        and options.tokenizer_sentencepiece_ignore_extra_whitespaces
        and not options.special_tokens
        and not options.metadata_path
    )


def _open_sentencepiece(path: str) -> Any:
    import sentencepiece

    if not os.path.isfile(path):
        raise DataError(f"--tokenizer-model {path} does not exist; train one with --train-tokenizer --vocab-size N")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as error:
        raise DataError(f"--tokenizer-model {path} is not a SentencePiece model, or is damaged") from error


def _load_sentencepiece(options: TokenizerOptions, sha256: str | None) -> Tokenizer:
    assert options.tokenizer_model is not None
    processor = _open_sentencepiece(options.tokenizer_model)
    eod = processor.eos_id() if processor.eos_id() >= 0 else None
    plan = plan_words(parse_model(Path(options.tokenizer_model).read_bytes()))
    method = f"whole documents: {plan}" if isinstance(plan, str) else _BY_WORDS
    return Tokenizer(options, processor.get_piece_size(), eod, sha256, method)


def _sentencepiece_encoder(tokenizer: Tokenizer, eod: int | None) -> Encoder:
    assert tokenizer.options.tokenizer_model is not None
    processor = _open_sentencepiece(tokenizer.options.tokenizer_model)
    model = parse_model(Path(tokenizer.options.tokenizer_model).read_bytes())
    rule = plan_words(model)
    if isinstance(rule, str):
        return PlainEncoder(lambda texts: map(partial(encode_whole, processor), texts), tokenizer.dtype, eod)
    words = SentencePieceWords(processor, model, rule)
    if model.is_unigram:
        return _unigram_encoder(words, model, rule, tokenizer, eod)
    return WordEncoder(rule, words.words, words.heads, words.whole, tokenizer.dtype, eod)


def _unigram_encoder(
    words: SentencePieceWords, model: SentencePieceModel, rule: CutRule, tokenizer: Tokenizer, eod: int | None
) -> Encoder:
    import sentencepiece

    return UnigramEncoder(
        rule,
        words,
        tokenizer.dtype,
        eod,
        lattice=unigram_lattice(model),
        rounding=rounding_of_totals(model),
        known_search=search_is_known(sentencepiece.__version__),
    )


def _backend_method(backend: str | None) -> str:
    if backend is None:
        return "one document at a time, by Megatron's tokenizer"
    plan = plan_byte_level(_open_backend(backend))
    return f"batches of whole documents: {plan}" if isinstance(plan, str) else _BY_WORDS


def _eod(megatron: Any) -> int | None:
    try:
        eod = megatron.eod
    except (AttributeError, NotImplementedError):
        return None
    return None if eod is None else int(eod)


def _fast_backend(megatron: Any, options: TokenizerOptions) -> str | None:
    """The Rust tokenizer inside a Hugging Face one, if calling the wrapper does nothing but call it."""
    inner = getattr(getattr(megatron, "_tokenizer", None), "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None or options.tokenizer_hf_no_include_special_tokens or options.metadata_path:
        return None
    text: str = backend.to_str()
    settings = json.loads(text)
    return None if settings.get("truncation") or settings.get("padding") else text


def _backend_encoder(tokenizer: Tokenizer, eod: int | None) -> Encoder:
    assert tokenizer.backend is not None
    backend = _open_backend(tokenizer.backend)
    plan = plan_byte_level(backend)
    if not isinstance(plan, str):
        words = ByteLevelWords(backend, plan)
        return WordEncoder(
            plan.rule,
            words.words,
            words.heads,
            words.whole,
            tokenizer.dtype,
            eod,
            suffix=plan.suffix,
            keeps_empty=bool(plan.prefix or plan.suffix),
        )

    def encode(texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return (encoding.ids for encoding in backend.encode_batch_fast(list(texts)))

    return PlainEncoder(encode, tokenizer.dtype, eod)


def _open_backend(serialized: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(serialized)
