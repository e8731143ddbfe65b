"""Which encoder serves a tokenizer: the reference that defines its ids, or gigatoken where it gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from more_megatron.data.encoding import Encode, Encoder
from more_megatron.data.errors import DocumentError
from more_megatron.data.fast import (
    FastEncode,
    Recipe,
    byte_level_recipe,
    checked,
    first_difference,
    is_installed,
    sentencepiece_recipe,
)
from more_megatron.data.tokenizers import (
    Tokenizer,
    TokenizerOptions,
    TokenizerType,
    build_megatron,
    is_direct_sentencepiece,
    open_backend,
    open_sentencepiece,
)

__all__ = ["EncoderPlan", "build_decoder", "build_encoder", "plan_encoder", "reference_encode"]

_NUMBERS = (TokenizerType.NULL, TokenizerType.NULL_MULTIMODAL)


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder that has been decided on, small enough to hand to every worker.

    Attributes:
        tokenizer: The tokenizer.
        append_eod: Whether documents end with the end-of-document token.
        recipe: How gigatoken encodes; None for the reference.
        name: The library, with its version: parts of a dataset by two of them are not mixed.
        reason: Why it is this one.
    """

    tokenizer: Tokenizer
    append_eod: bool
    recipe: Recipe | None
    name: str
    reason: str


def plan_encoder(
    tokenizer: Tokenizer, append_eod: bool, documents: Iterable[bytes], allow_fast: bool = True
) -> EncoderPlan:
    """Choose the encoder of a run; gigatoken is tried on the documents, the first of what will be encoded."""
    recipe = _recipe(tokenizer, documents) if allow_fast else "--encoder reference was given"
    if isinstance(recipe, Recipe):
        name = f"gigatoken {_version('gigatoken')}"
        reason = "its ids are the reference's on every piece, on hostile texts and on the first half megabyte"
        return EncoderPlan(tokenizer, append_eod, recipe, name, reason)
    library = "Megatron's tokenizer, a document at a time"
    if is_direct_sentencepiece(tokenizer.options):
        library = f"sentencepiece {_version('sentencepiece')}"
    elif tokenizer.backend is not None:
        library = f"tokenizers {_version('tokenizers')} in batches"
    return EncoderPlan(tokenizer, append_eod, None, library, f"not gigatoken: {recipe}")


def _recipe(tokenizer: Tokenizer, documents: Iterable[bytes]) -> Recipe | str:
    """How gigatoken encodes as the tokenizer does, or why it does not."""
    recipe: Recipe | str
    if is_direct_sentencepiece(tokenizer.options):
        recipe = sentencepiece_recipe(str(tokenizer.options.tokenizer_model))
    elif tokenizer.backend is not None:
        recipe = byte_level_recipe(open_backend(tokenizer.backend))
    else:
        recipe = "it does not know this type of tokenizer"
    if isinstance(recipe, str):
        return recipe
    if not is_installed():
        return "it is not installed (pip install 'more-megatron[fast]', several times faster)"
    try:
        difference = first_difference(
            FastEncode(recipe, _normalizer(tokenizer)), reference_encode(tokenizer), _pieces(tokenizer), documents
        )
    except Exception as error:
        return f"it refuses this tokenizer ({' '.join(str(error).split())[:120] or type(error).__name__})"
    return recipe if difference is None else f"its ids differ from the reference's, first in {difference}"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def build_encoder(plan: EncoderPlan) -> Encoder:
    """Build the encoder that was decided on."""
    tokenizer = plan.tokenizer
    encode = reference_encode(tokenizer)
    if plan.recipe is not None:
        encode = checked(FastEncode(plan.recipe, _normalizer(tokenizer)), encode)
    eod = tokenizer.eod if plan.append_eod else None
    return Encoder(encode, tokenizer.vocab_size, tokenizer.dtype, eod)


def _normalizer(tokenizer: Tokenizer) -> Callable[[bytes], bytes | str] | None:
    if tokenizer.backend is not None:
        return None
    normalize: Callable[[bytes], bytes | str] = open_sentencepiece(tokenizer.options).normalize
    return normalize


def _pieces(tokenizer: Tokenizer) -> Sequence[str]:
    """Every piece of the vocabulary as a text."""
    if tokenizer.backend is not None:
        backend = open_backend(tokenizer.backend)
        ids = [[id] for id in range(backend.get_vocab_size())]
        texts: list[str] = backend.decode_batch(ids, skip_special_tokens=False)
        return texts
    processor = open_sentencepiece(tokenizer.options)
    return [processor.id_to_piece(id).replace("\u2581", " ") for id in range(processor.get_piece_size())]


def reference_encode(tokenizer: Tokenizer) -> Encode:
    """Return the encoding that defines a tokenizer's ids: the library's below Megatron's wrapper, or the wrapper's."""
    if is_direct_sentencepiece(tokenizer.options):
        processor = open_sentencepiece(tokenizer.options)
        # Arrays are cheaper than lists of Python integers; older versions have only lists.
        ids = getattr(processor, "encode_as_numpy", processor.encode_as_ids)
        return lambda documents: map(ids, documents)
    if tokenizer.backend is not None:
        backend = open_backend(tokenizer.backend)
        return lambda documents: (encoding.ids for encoding in backend.encode_batch_fast(_texts(documents)))
    megatron = build_megatron(tokenizer.options)

    def encode(documents: Sequence[bytes]) -> Iterable[ArrayLike]:
        for index, text in enumerate(_texts(documents)):
            try:
                yield megatron.tokenize(text)
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                hint = "; it reads numbers, as in '17 4 8'" if tokenizer.options.tokenizer_type in _NUMBERS else ""
                raise DocumentError(
                    index, f"cannot be encoded by {tokenizer.options.tokenizer_type}: {reason}{hint}"
                ) from error

    return encode


def _texts(documents: Sequence[bytes]) -> list[str]:
    return [document.decode() for document in documents]


def build_decoder(options: TokenizerOptions) -> Callable[[list[int]], str]:
    """Return the function from token ids to text."""
    if is_direct_sentencepiece(options) and options.tokenizer_model:
        processor = open_sentencepiece(options)
        return lambda ids: str(processor.decode(ids))
    megatron = build_megatron(options)
    return lambda ids: str(megatron.detokenize(ids))
