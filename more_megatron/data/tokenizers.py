"""The tokenizer of a run: Megatron's types and options, and its facts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import warnings
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from more_megatron.data.indexed import token_dtype
from more_megatron.data.sources import sha256_of
from more_megatron.errors import MoREError, last_line


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
NULL_TYPES = (TokenizerType.NULL, TokenizerType.NULL_MULTIMODAL)
_TYPES_OF_FILES = (*SENTENCEPIECE_TYPES, TokenizerType.HUGGINGFACE, TokenizerType.TIKTOKEN, TokenizerType.SFT)
_MOST_IDS = 2**31
# transformers' class of no model in particular, under its names of versions 4 and 5.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# The files of a tokenizer folder that decide its ids.
_FOLDER_FILES = ("*.json", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class TokenizerOptions:
    """Megatron's tokenizer flags, under the names and with the meanings of its `TokenizerConfig`."""

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
    def from_args(cls, args: Any) -> TokenizerOptions:
        """Take the flags from parsed arguments, the trainer's or a tool's; absent ones keep their defaults."""
        flags = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        special = flags.get("special_tokens")
        return cls(**{**flags, "special_tokens": tuple(special) if special else None})


@dataclass(frozen=True)
class Tokenizer:
    """What a run needs to know of its tokenizer, small enough to hand to every worker."""

    options: TokenizerOptions  # the flags it was built from
    vocab_size: int  # number of ids, before Megatron's padding
    eod: int | None  # the id that Megatron's tokenizer answers as `.eod`
    sha256: str | None  # hash of its files, None for a tokenizer without files
    backend: str | None = None  # serialized Hugging Face tokenizer, where one is used directly

    def __post_init__(self) -> None:
        """Check that ids fit what they are stored in."""
        kind = self.options.tokenizer_type
        if self.vocab_size > _MOST_IDS:
            raise MoREError(f"{kind} has {self.vocab_size} ids, a dataset holds {_MOST_IDS}: lower --vocab-size")
        if self.eod is not None and not 0 <= self.eod < self.vocab_size:
            reason = f"ends documents with the id {self.eod} and has 0 to {self.vocab_size - 1}"
            raise MoREError(f"{kind} {reason}: change --null-tokenizer-eod-id or --vocab-size")

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the ids on disk."""
        return token_dtype(self.vocab_size)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        names = {"type": self.options.tokenizer_type, "model": self.options.tokenizer_model}
        return {**names, "sha256": self.sha256, "vocab_size": self.vocab_size, "eod": self.eod}


def load(options: TokenizerOptions) -> Tokenizer:
    """Read a tokenizer's facts.

    Megatron, which takes seconds to import, is asked only where the libraries below it do not suffice.

    Raises:
        MoREError: A flag is missing, or the tokenizer's files are missing or damaged.
    """
    _check(options)
    sha256 = tokenizer_sha256(options)
    if is_direct_sentencepiece(options):
        processor = open_sentencepiece(options)
        end = processor.eos_id()
        return Tokenizer(options, processor.get_piece_size(), end if end >= 0 else None, sha256)
    generic = _generic_huggingface(options)
    if generic is not None:
        return Tokenizer(options, len(generic), generic.eos_token_id, sha256, _serialized(generic))
    megatron = build_megatron(options)
    inner = getattr(getattr(megatron, "_tokenizer", None), "tokenizer", None)
    direct = not (options.tokenizer_hf_no_include_special_tokens or options.metadata_path)
    eod: int | None = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        eod = megatron.eod
    return Tokenizer(options, int(megatron.vocab_size), eod, sha256, _serialized(inner) if direct else None)


def _check(options: TokenizerOptions) -> None:
    kind = options.tokenizer_type
    if kind not in TokenizerType:
        raise MoREError(f"--tokenizer-type {kind} is not known; choose one of {', '.join(TokenizerType)}")
    if kind in _TYPES_OF_FILES and not options.tokenizer_model:
        raise MoREError(f"--tokenizer-type {kind} needs --tokenizer-model")
    if kind in NULL_TYPES and not options.vocab_size:
        raise MoREError(f"--tokenizer-type {kind} needs --vocab-size, the number of its ids")


def _generic_huggingface(options: TokenizerOptions) -> Any | None:
    """Open a tokenizer folder as Megatron's wrapper does, if its class is transformers' generic one.

    Neither Megatron nor torch is imported. Any other class, flag, or a model's configuration in the folder, which has
    a say in the class, is left to Megatron.
    """
    folder, code = Path(options.tokenizer_model or ""), options.trust_remote_code
    plain = TokenizerOptions(TokenizerType.HUGGINGFACE, options.tokenizer_model, trust_remote_code=code)
    if replace(options, vocab_size=None) != plain or (folder / "config.json").exists():
        return None
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if config.get("tokenizer_class") not in _GENERIC_CLASSES or "auto_map" in config:
            return None
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception:  # said by Megatron, which is asked next
        return None
    # What Megatron's wrapper fills in.
    filled: dict[str, Any] = {"additional_special_tokens": []}
    for one, other in (("eos_token", "sep_token"), ("bos_token", "cls_token")):
        first, second = getattr(tokenizer, one), getattr(tokenizer, other)
        if bool(first) != bool(second):
            filled[other if first else one] = first or second
    tokenizer.add_special_tokens(filled)
    return tokenizer


def _serialized(tokenizer: Any) -> str | None:
    """The Rust tokenizer inside a Hugging Face one, if calling the latter does nothing but call it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or backend.padding is not None:
        return None
    return str(backend.to_str())


def build_megatron(options: TokenizerOptions) -> Any:
    """Build Megatron's own tokenizer, as the trainer does."""
    _check(options)
    # Megatron's remarks on absent GPU libraries say nothing about text.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    absent = ("chat_template", "null_tokenizer_pad_id", "tokenizer_prompt_format", "image_tag_type")
    flags: dict[str, Any] = {**dict.fromkeys(absent), **asdict(options)}
    flags |= {"pad_vocab_size": False, "force_system_message": False, "rank": 0}
    flags |= {"sft_tokenizer_prompt_format": "default", "special_tokens": list(options.special_tokens or ()) or None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        try:
            return build_tokenizer(SimpleNamespace(**flags))
        except Exception as error:
            what = options.tokenizer_model or options.vocab_file or options.tokenizer_type
            raise MoREError(
                f"{options.tokenizer_type} cannot be built from {what}: {last_line(error)[:300]}"
            ) from error


def tokenizer_sha256(options: TokenizerOptions) -> str | None:
    """Hash the file that decides a tokenizer's ids, or names and contents of several; None without local files."""
    model = Path(options.tokenizer_model or "")
    files = [Path(name) for name in (options.vocab_file, options.merge_file) if name and os.path.isfile(name)]
    if options.tokenizer_model and model.is_dir():
        files = sorted({path for pattern in _FOLDER_FILES for path in model.glob(pattern) if path.is_file()}) + files
    elif options.tokenizer_model and model.is_file():
        files = [model, *files]
    hashes = [sha256_of(path) for path in files]
    if len(files) < 2:
        return hashes[0] if hashes else None
    lines = [f"{path.name}\0{sha256}\n" for path, sha256 in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_direct_sentencepiece(options: TokenizerOptions) -> bool:
    """Whether Megatron's wrapper hands the text to SentencePiece untouched."""
    return (
        options.tokenizer_type in SENTENCEPIECE_TYPES
        and not options.tokenizer_sentencepiece_legacy
        and options.tokenizer_sentencepiece_ignore_extra_whitespaces
        and not options.special_tokens
        and not options.metadata_path
    )


def open_sentencepiece(options: TokenizerOptions) -> Any:
    """Open the model of a SentencePiece tokenizer."""
    import sentencepiece

    path = options.tokenizer_model or ""
    if not os.path.isfile(path):
        raise MoREError(f"--tokenizer-model {path} does not exist; train one with --train-tokenizer --vocab-size N")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as error:
        raise MoREError(f"--tokenizer-model {path} is not a SentencePiece model, or is damaged") from error
