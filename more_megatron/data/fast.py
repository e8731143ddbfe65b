"""Encoding by gigatoken where it gives the ids of the reference, and the checks on which that rests.

What gigatoken makes of a tokenizer is compared with the reference before it is used, and once a task after that.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from more_megatron.errors import MoREError

Encode = Callable[[Sequence[bytes]], Sequence[ArrayLike]]
"""Gives the ids of each of some documents, which come as UTF-8."""

# gigatoken keeps every word it has met; from this much text on it starts again.
_RENEW_BYTES = 1 << 25
_SAMPLE_BYTES = 1 << 20
# A longer document is not encoded twice if its task has a shorter one.
_CHECKED_BYTES = 1 << 13

HOSTILE_TEXTS = (
    "", " ", "   ", "\n\n \n", "a", " a", "a ", "  a   b    c  ", "\ta\t\tb\t", "a\0b \0 c\0", "\u2581",
    "a\u2581b \u2581 c \u2581\u2581d\u2581", "\U0001f600\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 x",
    "\U0001f1e9\U0001f1ea", "e\u0301 a\u0308 \u0301 \u0308a", "\u00a8 \u00b4x y\u00a8", "\ufdfa \u202e a \u202c",
    "\u0627\u0644\u0633", "a\r\nb\r\n\r\nc\rd", "</s> <s> <unk> <pad> a</s>b <0x41> <mask>x", "\u00a0 c\u00a0",
    "\u3000a\u3000 \u3000b", "\u200b a \u200b b\u200b", "\x1c\x1d\x1e\x1f a\x0b \x0c b\x7f", "\x85 \u2028 \u2029 x",
    "\ufeff a \ufffd b", "x" * 300 + " y", "12345 67890 " * 10, "\u4e2d\u6587\u6ca1\u3002" * 10, "\U0010ffff \ue000",
    "it's 'S I'LL don\u2019t DON'T", "\u0130I\u0307 \u017ft \u01c5", "\u0661\u0662\u0663 \u00b2\u00b3 \u2167", "\ud7ff",
    "\u0915\u094d\u0937\u093f", "\t\t\tif x:\n\t\t\t\ty  \n\n  z", *(letter * 70 for letter in " =-*#\n\ta0"),
)  # fmt: skip


class DocumentError(MoREError):
    """A document that cannot be encoded: its place among those given, and what is wrong with it."""

    def __str__(self) -> str:
        return "document {} {}".format(*self.args)


@dataclass(frozen=True)
class Recipe:
    """How gigatoken encodes as another tokenizer does."""

    settings: str  # contents of a `tokenizer.json`
    prefix: tuple[int, ...] = ()  # ids before each document
    suffix: tuple[int, ...] = ()  # ids after each document


class FastEncode:
    """Encodes by gigatoken, in bounded memory, what the reference's normalisation leaves of a document."""

    def __init__(self, recipe: Recipe, normalize: Callable[[Sequence[bytes]], Sequence[bytes]]) -> None:
        self._recipe = recipe
        self._normalize = normalize
        self._met = _RENEW_BYTES
        self._tokenizer: Any = None

    def __call__(self, documents: Sequence[bytes]) -> list[ArrayLike]:
        """Return the ids of each document."""
        found: list[ArrayLike] = []
        prefix, suffix = self._recipe.prefix, self._recipe.suffix
        for document in self._normalize(documents):
            if self._met >= _RENEW_BYTES:
                self._renew()
            self._met += len(document)
            ids = self._tokenizer.encode(document)
            found.append(np.concatenate([prefix, ids, suffix]).astype(np.uint32) if prefix or suffix else ids)
        return found

    def _renew(self) -> None:
        import gigatoken

        # First the old one goes, so that there are never two.
        self._tokenizer = None
        self._tokenizer = gigatoken.Tokenizer.from_json(self._recipe.settings)
        self._met = 0


def checked(fast: Encode, reference: Encode) -> Encode:
    """Compare one document of each call with the reference; the call raises `DocumentError` if it differs."""

    def encode(documents: Sequence[bytes]) -> Sequence[ArrayLike]:
        try:
            found = fast(documents)
        except Exception as error:
            raise MoREError(f"gigatoken fails: {error}; --encoder reference does without it") from error
        # The longest document that is quickly encoded, else the shortest.
        ranks = {n: len(text) * (1 if len(text) <= _CHECKED_BYTES else -1) for n, text in enumerate(documents) if text}
        if ranks:
            index = max(ranks, key=ranks.__getitem__)
            if _integers(found[index]) != _integers(reference([documents[index]])[0]):
                raise DocumentError(index, "has other tokens by gigatoken than by the reference tokenizer")
        return found

    return encode


def first_difference(fast: Encode, reference: Encode, pieces: Sequence[str], documents: Iterable[bytes]) -> str | None:
    """Return the beginning of the first text that two ways to encode disagree on, or None.

    They are compared on every piece, on hostile texts and on the first megabyte of the documents.
    """
    around = [f"a {piece}b{piece} \n{piece}" for piece in pieces if piece.startswith(("<", "["))]
    texts = [text.encode() for text in (*HOSTILE_TEXTS, *around, *pieces)]
    size = 0
    for document in documents:
        # A document may be larger than the sample; its last character may be cut.
        start = document[: _SAMPLE_BYTES - size].decode(errors="ignore").encode()
        texts.append(start)
        size += len(start)
        if size >= _SAMPLE_BYTES - 3:
            break
    both = zip(texts, fast(texts), reference(texts), strict=True)
    different = (text for text, ours, theirs in both if _integers(ours) != _integers(theirs))
    return next((repr(text[:40].decode(errors="replace")) for text in different), None)


def _integers(ids: Any) -> list[int]:
    """Python integers: for the few ids of a piece they are compared in a fraction of numpy's time."""
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
