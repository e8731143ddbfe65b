"""What kind of token a token is: a number, punctuation, a word, a part of one, a single character."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = ("numeric", "punctuation", "word", "sub-word", "single character", "other")
"""`word`: a whole word in one token; `sub-word`: a part of one; `other`: spaces, parts of characters, specials."""

_NUMERIC, _PUNCTUATION, _WORD, _SUB_WORD, _SINGLE, _OTHER = range(len(KINDS))
# What marks the beginning of a word in SentencePiece and in byte-level BPE, where a line break has a sign, too.
_SPACES = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n", "\u0109": "\t"})
_CONTINUATION = re.compile(r"##(?=\w)")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenKinds:
    """Tells the kinds of tokens of one tokenizer; the vocabulary is that of the model's embedding."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
        special = set(tokenizer.all_special_ids)
        self._texts = ["" if token in special else _text(piece) for token, piece in enumerate(pieces)]
        self._texts += [""] * (vocab_size - len(pieces))
        self._names = [*(str(piece) for piece in pieces), *(["<unused>"] * (vocab_size - len(pieces)))]
        self._base = np.array([_base_kind(text.strip()) for text in self._texts], dtype=np.int8)
        # Whether a token begins a word, whatever stands before it; WordPiece marks those that do not.
        self._begins = np.array([_CONTINUATION.match(name) is None for name in self._names])
        if self._begins.all():
            self._begins = np.array([text[:1].isspace() for text in self._texts])

    def of(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the index in `KINDS` of each token of a text, [s]: parts of words are told by their neighbours."""
        ids = np.asarray(tokens)
        kinds = self._base[ids].astype(np.int64)
        letters = (kinds == _WORD) | (kinds == _SINGLE)
        goes_on = np.zeros(len(ids) + 1, dtype=bool)
        goes_on[1:-1] = letters[:-1] & letters[1:] & ~self._begins[ids[1:]]
        in_parts = goes_on[:-1] | goes_on[1:]
        kinds[(kinds == _WORD) & in_parts] = _SUB_WORD
        return kinds

    def name(self, token: int) -> str:
        """Return a token as people write it, a space as an underscore."""
        text = self._texts[token]
        return text.replace(" ", "_").replace("\n", "\\n").replace("\t", "\\t") if text else self._names[token]


def _text(piece: str | bytes) -> str:
    text = piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece
    if byte := _BYTE.fullmatch(text):
        return bytes.fromhex(byte[1]).decode("ascii", "ignore")
    return text[2:] if _CONTINUATION.match(text) else text.translate(_SPACES)


def _base_kind(text: str) -> int:
    """Return the kind of a token without its neighbours: no letters are told to be parts of words yet."""
    if not text:
        return _OTHER
    if not any(character.isalnum() for character in text):
        return _PUNCTUATION
    if all(character.isdigit() or character in ".,-" for character in text):
        return _NUMERIC
    return _SINGLE if len(text) == 1 else _WORD
