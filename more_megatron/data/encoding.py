"""What every way of encoding gives back, and the plain way: one document after the other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoded", "Encoder", "PlainEncoder"]


@dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive documents.

    Args:
        tokens: ids of all documents, end to end [tokens].
        lengths: tokens of each document with its end-of-document token, int32 [documents]; 0 for a document that has
            no token of its own, which then has no end-of-document token either, as in Megatron's tool.
    """

    tokens: NDArray[np.generic]
    lengths: NDArray[np.int32]


class Encoder(Protocol):
    """Turns documents into tokens."""

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Encode documents, given as UTF-8, in order."""


class PlainEncoder:
    """Hands whole documents to the tokenizer.

    Args:
        encode_all: gives the tokens of each of some documents.
        dtype: dtype of the token ids.
        eod: token that ends each document, or None.
    """

    def __init__(
        self,
        encode_all: Callable[[Sequence[str]], Iterable[Sequence[int] | NDArray[np.integer]]],
        dtype: np.dtype,
        eod: int | None,
    ) -> None:
        self._encode_all = encode_all
        self._dtype = dtype
        self._eod = np.array([] if eod is None else [eod], dtype=dtype)

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Encode documents.

        Args:
            documents: the documents as UTF-8.

        Returns:
            Their tokens, in order.
        """
        parts: list[NDArray[np.generic]] = []
        lengths = np.zeros(len(documents), dtype=np.int32)
        for index, ids in enumerate(self._encode_all([document.decode() for document in documents])):
            if len(ids):
                parts += [np.asarray(ids, dtype=self._dtype), self._eod]
                lengths[index] = len(ids) + len(self._eod)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, self._dtype), lengths)
