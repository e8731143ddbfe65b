"""Documents to token ids as they lie on disk, whatever tokenizer gives the ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from more_megatron.data.errors import DocumentError

__all__ = ["Encode", "Encoded", "Encoder"]

Encode = Callable[[Sequence[bytes]], Iterable[ArrayLike]]
"""Gives the ids of each of some documents, which come as UTF-8."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive documents.

    Attributes:
        tokens: Ids of all documents, end to end [tokens].
        lengths: Tokens of each document with its end-of-document token, int32 [documents]; 0 for a document that has
            no token of its own, which then has no end-of-document token either, as in Megatron's tool.
    """

    tokens: NDArray[np.generic]
    lengths: NDArray[np.int32]


class Encoder:
    """Puts the ids of documents together.

    Args:
        encode: Gives the ids of documents.
        vocab_size: Number of ids.
        dtype: dtype of ids on disk.
        eod: Token that ends each document, or None.
    """

    def __init__(self, encode: Encode, vocab_size: int, dtype: np.dtype, eod: int | None) -> None:
        self._encode = encode
        self._vocab_size = vocab_size
        self._dtype = dtype
        # Of the dtype on disk, with which the ids' own dtype is not widened.
        self._eod = np.array([] if eod is None else [eod], dtype=dtype)

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Return the tokens of documents that come as UTF-8.

        Raises:
            DocumentError: A document gives an id that the tokenizer does not have.
        """
        parts: list[ArrayLike] = [np.empty(0, self._dtype)]
        lengths = np.zeros(len(documents), dtype=np.int32)
        for index, ids in enumerate(self._encode(documents)):
            count = len(ids)  # type: ignore[arg-type]
            if count:
                parts += [ids, self._eod]
                lengths[index] = count + len(self._eod)
        tokens = np.concatenate(parts)
        if tokens.dtype.kind not in "iu" or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size):
            self._refuse(tokens, lengths)
        return Encoded(tokens.astype(self._dtype), lengths)

    def _refuse(self, tokens: NDArray[np.generic], lengths: NDArray[np.int32]) -> None:
        values = [int(id) for id in tokens.tolist()]
        place = next(place for place, id in enumerate(values) if not 0 <= id < self._vocab_size)
        index = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        raise DocumentError(index, f"gives the id {values[place]}, the tokenizer has 0 to {self._vocab_size - 1}")
