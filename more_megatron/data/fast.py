"""Encoding by gigatoken where it gives the ids of the reference tokenizer, and the checks on which that rests.

gigatoken segments; everything around it stays with the reference:

- SentencePiece BPE: SentencePiece normalises, and gigatoken joins the characters. It knows only pieces that are found
  by merging, so models with user-defined or unused pieces are refused, and so are pieces of equal score, between which
  SentencePiece goes from left to right. Control pieces must not be found in a text, so no merge leads to one.
- Byte-level BPE: gigatoken splits and joins, and the special tokens around a text are put there here.

What gigatoken makes of a tokenizer is compared with the reference before it is used, and once a task after that.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from more_megatron.data.encoding import Encode
from more_megatron.data.errors import DataError, DocumentError

__all__ = [
    "FastEncode",
    "Recipe",
    "byte_level_recipe",
    "checked",
    "first_difference",
    "is_installed",
    "sentencepiece_recipe",
]

# gigatoken keeps every word it has met; from this much text on it starts again.
_RENEW_BYTES = 1 << 24
_SAMPLE_BYTES = 1 << 19
# A longer document is not encoded twice if its task has a shorter one.
_CHECKED_BYTES = 1 << 13

_HOSTILE = (
    "", " ", "   ", "\n\n \n", "a", " a", "a ", "  a   b    c  ", "\ta\t\tb\t", "a\0b \0 c\0", "\u2581",
    "a\u2581b \u2581 c \u2581\u2581d\u2581", "\U0001f600\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 x",
    "\U0001f1e9\U0001f1ea", "e\u0301 a\u0308 \u0301 \u0308a", "\u00a8 \u00b4x y\u00a8", "\ufdfa \u202e a \u202c",
    "\u0627\u0644\u0633", "a\r\nb\r\n\r\nc\rd", "</s> <s> <unk> <pad> a</s>b <0x41> <mask>x", "\u00a0 c\u00a0",
    "\u3000a\u3000 \u3000b", "\u200b a \u200b b\u200b", "\x1c\x1d\x1e\x1f a\x0b \x0c b\x7f", "\x85 \u2028 \u2029 x",
    "\ufeff a \ufffd b", "x" * 300 + " y", "12345 67890 " * 10, "\u4e2d\u6587\u6ca1\u3002" * 10, "\U0010ffff \ue000",
    "it's 'S I'LL don\u2019t DON'T", "\u0130I\u0307 \u017ft \u01c5", "\u0661\u0662\u0663 \u00b2\u00b3 \u2167", "\ud7ff",
    "\u0915\u094d\u0937\u093f", "\t\t\tif x:\n\t\t\t\ty  \n\n  z", *(letter * 70 for letter in " =-*#\n\ta0"),
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How gigatoken encodes as another tokenizer does.

    Attributes:
        settings: Contents of a `tokenizer.json`.
        prefix: Ids before each document.
        suffix: Ids after each document.
    """

    settings: str
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def is_installed() -> bool:
    """Whether gigatoken is here."""
    with contextlib.suppress(ValueError):  # blocked, as by a test
        return find_spec("gigatoken") is not None
    return False


def sentencepiece_recipe(model: str | Path) -> Recipe | str:
    """Describe a SentencePiece model file to gigatoken, or say why it cannot be."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(Path(model).read_bytes())
    kinds = proto.SentencePiece
    unused = {piece.type for piece in proto.pieces} - {kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE}
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return "it does not know the model's algorithm"
    if not proto.trainer_spec.byte_fallback:
        return "it does not know models without byte fallback"
    if unused:
        return "it does not know user-defined and unused pieces"
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    joined = [score for piece, score in scores.items() if len(piece) > 1]
    if len(set(joined)) < len(joined):
        return "pieces of the model have equal scores"
    ids = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    settings: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": proto.trainer_spec.unk_piece,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(scores, ids),
        },
    }
    return Recipe(json.dumps(settings, ensure_ascii=False))


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the third with the highest score first."""
    found = []
    for piece, score in scores.items():
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in scores and right in scores:
                found.append((-score, -middle, ids[left], (left, right)))
    found.sort()
    return [pair for *_, pair in found]


def byte_level_recipe(backend: Any) -> Recipe | str:
    """Describe a tokenizer of the tokenizers library to gigatoken, or say why it cannot be."""
    settings = json.loads(backend.to_str())
    model, added = settings["model"], settings["added_tokens"]
    if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(settings["pre_tokenizer"]):
        return "it does not know the tokenizer's algorithm"
    if model.get("dropout") or any(token["single_word"] for token in added):
        return "it does not know dropout and tokens that stand only alone"
    if settings["normalizer"] and any(token["normalized"] for token in added):
        return "it does not normalise added tokens"
    inner = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    starts = [start for start in range(len(whole)) if whole[start : start + len(inner)] == inner]
    if len(starts) != 1:
        return "the special tokens around a text cannot be told from it"
    end = starts[0] + len(inner)
    return Recipe(json.dumps({**settings, "post_processor": None}), tuple(whole[: starts[0]]), tuple(whole[end:]))


class FastEncode:
    """Encodes by gigatoken, in bounded memory.

    Args:
        recipe: How.
        normalize: What the reference does to a text before it segments it.
    """

    def __init__(self, recipe: Recipe, normalize: Callable[[bytes], bytes | str] | None) -> None:
        self._recipe = recipe
        self._normalize = normalize or bytes
        self._met = _RENEW_BYTES
        self._tokenizer: Any = None

    def __call__(self, documents: Sequence[bytes]) -> Iterator[ArrayLike]:
        """Yield the ids of each document."""
        prefix, suffix = self._recipe.prefix, self._recipe.suffix
        for document in documents:
            if self._met >= _RENEW_BYTES:
                self._renew()
            self._met += len(document)
            ids = self._tokenizer.encode(self._normalize(document))
            yield np.concatenate([prefix, ids, suffix]).astype(np.uint32) if prefix or suffix else ids

    def _renew(self) -> None:
        import gigatoken

        # First the old one goes, so that there are never two.
        self._tokenizer = None
        self._tokenizer = gigatoken.Tokenizer.from_json(self._recipe.settings)
        self._met = 0


def checked(fast: Encode, reference: Encode) -> Encode:
    """Compare one document of each call with the reference; the call raises `DocumentError` if it differs."""

    def encode(documents: Sequence[bytes]) -> Iterable[ArrayLike]:
        try:
            found = list(fast(documents))
        except Exception as error:
            raise DataError(f"gigatoken fails: {error}; --encoder reference does without it") from error
        index = _choose(documents)
        if index is not None:
            (expected,) = reference([documents[index]])
            if not np.array_equal(np.asarray(found[index]), np.asarray(expected)):
                raise DocumentError(index, "has other tokens by gigatoken than by the reference tokenizer")
        return found

    return encode


def _choose(documents: Sequence[bytes]) -> int | None:
    """Index of the longest document that is quickly encoded, else of the shortest that has a text."""
    sizes = [(len(document), index) for index, document in enumerate(documents) if document]
    quick = [entry for entry in sizes if entry[0] <= _CHECKED_BYTES]
    return max(quick)[1] if quick else min(sizes)[1] if sizes else None


def first_difference(fast: Encode, reference: Encode, pieces: Sequence[str], documents: Iterable[bytes]) -> str | None:
    """Compare two ways to encode on every piece, on hostile texts and on the first half megabyte of the documents.

    Returns:
        The beginning of the first text that differs, or None.
    """
    around = [f"a {piece}b{piece} \n{piece}" for piece in pieces if piece.startswith(("<", "["))]
    texts = [text.encode() for text in (*_HOSTILE, *around, *pieces)]
    size = 0
    for document in documents:
        # A document may be larger than the sample; its last character may be cut.
        start = document[: _SAMPLE_BYTES - size].decode(errors="ignore").encode()
        texts.append(start)
        size += len(start)
        if size >= _SAMPLE_BYTES - 3:
            break
    for text, ours, theirs in zip(texts, fast(texts), reference(texts), strict=True):
        if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
            return repr(text[:40].decode(errors="replace"))
    return None
