"""From text to token ids by looking up words, many at a time.

A word is what lies between two cuts of a text; whoever builds a table vouches that the tokens of a text are those of
its words, one after the other (`sentencepiece_words.py` proves it for a model). The table knows each word by its bytes:
words of up to 15 bytes are found together (`wordhash.py`), longer ones in a dictionary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.wordhash import WordHash, WordKeys

__all__ = ["LONGEST_WORD", "POISON", "EncodeWords", "WordTable", "WordTokens", "cut_out", "splice"]

POISON = 0
"""Word id of every word that has no tokens of its own."""

LONGEST_WORD = 256
"""Bytes; longer words have no tokens of their own, since they seldom come again and would fill the memory."""

# Tokens that are stored, and found, together.
_ROW = 4
_NEW = -1
_PACKED = {2: np.dtype(np.uint64), 4: np.dtype(np.complex128)}
_MOST_ROWS = 1 << 19
# A window of new words fits in beside the words of a table that is nearly full.
_SLOT_BITS = 20


@dataclass(frozen=True)
class WordTokens:
    """Tokens of some words, less those that do not decide them alone, whose documents must be encoded whole.

    Args:
        places: which of the words these are, int64 [decided].
        counts: tokens of each, int64 [decided].
        tokens: the tokens, end to end [tokens].
    """

    places: NDArray[np.int64]
    counts: NDArray[np.int64]
    tokens: NDArray[np.integer]

    @classmethod
    def of(cls, words: Sequence[Sequence[int] | None]) -> "WordTokens":
        """Put together the tokens of each word, None for one that does not decide them."""
        decided = [tokens for tokens in words if tokens is not None]
        return cls(
            places=np.flatnonzero([tokens is not None for tokens in words]),
            counts=np.array([len(tokens) for tokens in decided], dtype=np.int64),
            tokens=np.array(list(chain.from_iterable(decided)), dtype=np.int64),
        )


EncodeWords = Callable[[list[bytes]], WordTokens]
"""Encodes distinct words, given as UTF-8."""


class WordTable:
    """Words seen so far and their tokens. Its memory is bounded: a full table is emptied and fills again.

    Args:
        encode: encodes words it has not seen.
        dtype: dtype of token ids; its largest value (uint16) or -1 (int32) must not be an id.
        capacity: rows of tokens to hold; a word takes one for every four of its tokens.
    """

    def __init__(self, encode: EncodeWords, dtype: np.dtype, capacity: int = _MOST_ROWS) -> None:
        self._encode = encode
        self._capacity = capacity
        self._blank = np.array(-1).astype(dtype)[()]
        self._rows = np.full((1024, _ROW), self._blank, dtype=dtype)
        self._counts = np.zeros(1024, dtype=np.int32)
        self._short = WordHash(_SLOT_BITS)
        self._long: dict[bytes, int] = {}
        self._used = 0
        self.clear()

    def clear(self) -> None:
        """Forget all words."""
        self._short.clear()
        self._long.clear()
        self._used = 1
        self._rows[POISON] = self._blank

    @property
    def full(self) -> bool:
        """Whether the table should be emptied before the next look-up."""
        return max(self._used, len(self._short) + len(self._long)) >= self._capacity

    def add(self, tokens: Sequence[int]) -> int:
        """Store a word that no text can spell, such as the end of a document.

        Returns:
            Its id.
        """
        return int(self._store(np.array(tokens), np.array([len(tokens)]))[0])

    def store(self, found: WordTokens, count: int) -> NDArray[np.int64]:
        """Store the tokens of `count` words; returns their ids, `POISON` for those that do not decide their tokens."""
        ids = np.full(count, POISON, dtype=np.int64)
        ids[found.places] = self._store(found.tokens, found.counts)
        return ids

    def _store(self, tokens: NDArray[np.integer], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        segments = np.maximum(1, -(-counts // _ROW))
        ends = np.cumsum(segments) + self._used
        ids: NDArray[np.int64] = ends - segments
        used = int(ends[-1]) if len(ends) else self._used
        self._reserve(used)
        self._rows[self._used : used] = self._blank
        self._rows.reshape(-1)[_spread(ids * _ROW, counts)] = tokens
        self._counts[ids] = counts
        self._used = used
        return ids

    def look_up(
        self,
        text: bytes,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        choose: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    ) -> NDArray[np.int64]:
        """Find words, encoding new ones.

        Args:
            text: the window that holds them, without NUL bytes.
            starts: first byte of each word, int64 [words].
            ends: byte after each word, int64 [words].
            choose: is given the places of words that are new, and says of which of them tokens are wanted.

        Returns:
            Word ids, int64 [words]; `POISON` for words without tokens of their own and for those not wanted.
        """
        keys = WordKeys.of(text, starts, ends)
        ids, missed = self._short.find(keys)
        are_long = keys.are_long(missed)
        long = missed[are_long]
        ids[long] = POISON
        long = long[ends[long] - starts[long] <= LONGEST_WORD]
        new = np.concatenate([missed[~are_long], self._find_long(cut_out(text, starts, ends, long), long, ids)])
        if len(new):
            ids[new] = POISON
            new = new[choose(new)]
            self._learn(cut_out(text, starts, ends, new), new, ids, keys)
        return ids

    def gather(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Tokens of words, one after the other.

        Args:
            ids: word ids, int64 [words].

        Returns:
            Token ids [tokens], and how many stand before each word and behind the last, int64 [words + 1].
        """
        counts = self._counts.take(ids)
        # One item of 8 or 16 bytes for each row: numpy gathers scalars much faster than short rows.
        packed = self._rows.view(_PACKED[self._rows.itemsize]).reshape(-1)
        flat = packed.take(_with_following(ids, counts)).view(self._rows.dtype)
        bounds = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(counts, out=bounds[1:])
        return flat.compress(flat != self._blank), bounds

    def tokens_of(self, word_id: int) -> NDArray[np.integer]:
        """Tokens of one word."""
        return self._rows.reshape(-1)[_ROW * word_id :][: self._counts[word_id]]

    def _find_long(self, words: list[bytes], places: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Fill in the ids of the places where long words stand; returns the places of those that are new."""
        ids[places] = [self._long.get(word, _NEW) for word in words]
        new: NDArray[np.int64] = places[ids[places] == _NEW]
        return new

    def _learn(self, words: list[bytes], places: NDArray[np.int64], ids: NDArray[np.int64], keys: WordKeys) -> None:
        """Encode new words, which may repeat, and fill in the ids of the places where they stand."""
        if not words:
            return
        place_of = dict(zip(words, places.tolist(), strict=True))
        new = list(place_of)
        where = np.array(list(place_of.values()))
        learnt = self._learn_new(new)
        id_of = dict(zip(new, learnt.tolist(), strict=True))
        ids[places] = [id_of[word] for word in words]
        are_long = keys.are_long(where)
        self._short.insert(keys, where[~are_long], learnt[~are_long])
        self._long.update((word, id_of[word]) for word in compress(new, are_long.tolist()))

    def _learn_new(self, words: list[bytes]) -> NDArray[np.int64]:
        """Encode and store words; returns their ids."""
        return self.store(self._encode(words), len(words))

    def _reserve(self, rows: int) -> None:
        have = len(self._rows)
        if rows <= have:
            return
        grown = max(rows, 2 * have)
        self._rows = np.concatenate([self._rows, np.full((grown - have, _ROW), self._blank, dtype=self._rows.dtype)])
        self._counts = np.concatenate([self._counts, np.zeros(grown - have, dtype=np.int32)])


def cut_out(text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], places: NDArray[np.int64]) -> list[bytes]:
    """Some of the words of a text, given the first byte of each and the byte after it."""
    return [text[start:end] for start, end in zip(starts[places].tolist(), ends[places].tolist(), strict=True)]


def splice(
    items: NDArray[Any], bounds: NDArray[np.int64], others: Mapping[int, NDArray[Any]]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Exchange the items of some groups for others.

    Args:
        items: items of all groups, one after the other.
        bounds: items before each group and behind the last, int64 [groups + 1].
        others: the new items of each of some groups, any number.

    Returns:
        The items and bounds that result.
    """
    groups = np.array(sorted(others), dtype=np.int64)
    starts, ends = bounds[groups], bounds[groups + 1]
    parts = []
    position = 0
    for group, start, end in zip(groups.tolist(), starts.tolist(), ends.tolist(), strict=True):
        parts += [items[position:start], others[group]]
        position = end
    growth = np.array([len(others[group]) for group in groups.tolist()], dtype=np.int64) - (ends - starts)
    if growth.any():
        grown = np.zeros(len(bounds), dtype=np.int64)
        grown[groups + 1] = growth
        bounds = bounds + np.cumsum(grown)
    return np.concatenate([*parts, items[position:]]), bounds


def _spread(firsts: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Places of things of which some stand side by side from each of some places on."""
    places: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    return places


def _with_following(ids: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """All rows of some words, given their ids, which are their first rows, and how many tokens each has."""
    large = np.flatnonzero(counts > _ROW)
    if not len(large):
        return ids
    more = (counts.take(large) - 1) // _ROW
    ends = np.cumsum(more)
    following = _spread(large + 1 + ends - more, more)
    every = np.empty(len(ids) + int(ends[-1]), dtype=np.int64)
    is_first = np.ones(len(every), dtype=bool)
    is_first[following] = False
    every[is_first] = ids
    every[following] = _spread(ids.take(large) + 1, more)
    return every
