"""From text to token ids by looking up words, many at a time.

A word is what lies between two cuts of a text; whoever builds a table vouches that the tokens of a text are those of
its words, one after the other (`sentencepiece_words.py` proves it for a model). The table knows each word by its bytes:
words of up to 15 bytes are compared as two 64-bit integers in an open hash table, longer ones in a dictionary, so a
look-up is exact and a whole window of text costs a few dozen numpy calls. Where numpy offers two ways, `take` and
`compress` are used: they are several times faster than indexing with arrays of integers and booleans.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

__all__ = ["POISON", "WordTable", "WordTokens"]

WordTokens = Sequence[int] | None
"""Token ids of a word; None where the word alone does not decide them and its document must be encoded whole."""

POISON = 0
"""Word id of every word that has no tokens of its own."""

_SHORT_BYTES = 15
ROW = 4
"""Tokens that are stored, and found, together."""

_SLOT_BITS = 19
_PACKED = {2: np.dtype(np.uint64), 4: np.dtype(np.complex128)}
_MOST_ROWS = 1 << 19
_MIX_LOW = np.uint64(0x9E3779B97F4A7C15)
_MIX_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)
_KEEP = np.array([(1 << (8 * count)) - 1 for count in range(9)], dtype=np.uint64)
# UTF-8 has no such bytes, so no word has this as its key, and no word of up to 8 bytes has the upper byte.
_NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
_UPPER_BYTE = np.uint64(0xFF00000000000000)


class WordTable:
    """Words seen so far and their tokens. Its memory is bounded: a full table is emptied and fills again.

    Args:
        encode: gives the tokens of words it has not seen.
        dtype: dtype of token ids; its largest value (uint16) or -1 (int32) must not be an id.
        capacity: rows of tokens to hold; a word takes one for every four of its tokens.
    """

    def __init__(
        self, encode: Callable[[list[bytes]], list[WordTokens]], dtype: np.dtype, capacity: int = _MOST_ROWS
    ) -> None:
        self._encode = encode
        self._capacity = capacity
        self._blank = np.array(-1).astype(dtype)[()]
        self._rows = np.full((1024, ROW), self._blank, dtype=dtype)
        # First key and id side by side, so that most words are found by one access to memory.
        self._slots = np.zeros((1 << _SLOT_BITS, 2), dtype=np.uint64)
        self._slots_low, self._slots_id = self._slots.T
        self._slots_high = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self._counts = np.zeros(1024, dtype=np.int32)
        self._others: dict[bytes, int] = {}
        self._used = 0
        self.clear()

    def clear(self) -> None:
        """Forget all words."""
        self._slots_low[:] = _NO_KEY
        self._others.clear()
        self._used = 1
        self._rows[POISON] = self._blank

    @property
    def full(self) -> bool:
        """Whether the table should be emptied before the next look-up."""
        return self._used >= self._capacity

    def add(self, tokens: Sequence[int]) -> int:
        """Store a word that no text can spell, such as the end of a document.

        Returns:
            Its id.
        """
        return int(self._add_all([tokens])[0])

    def _add_all(self, words: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        counts = np.array([len(tokens) for tokens in words], dtype=np.int64)
        return self._store(np.fromiter(chain.from_iterable(words), self._rows.dtype, counts.sum()), counts)

    def _store(self, tokens: NDArray[np.integer], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Store words of which the tokens stand end to end; returns their ids."""
        segments = np.maximum(1, -(-counts // ROW))
        ends = np.cumsum(segments) + self._used
        ids: NDArray[np.int64] = ends - segments
        used = int(ends[-1]) if len(ends) else self._used
        self._reserve(used)
        self._rows[self._used : used] = self._blank
        self._rows.reshape(-1)[spread(ids * ROW, counts)] = tokens
        self._counts[ids] = counts
        self._used = used
        return ids

    def look_up(self, text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find words, encoding those that are new.

        Args:
            text: the window that holds them, without NUL bytes.
            starts: first byte of each word, int64 [words].
            ends: byte after each word, int64 [words].

        Returns:
            Word ids, int64 [words]; `POISON` for words without tokens of their own.
        """
        low, high, wide = _keys(text, starts, ends)
        slots = _hash(low, high, wide)
        found = self._slots.take(slots, axis=0)
        ids = found[:, 1].astype(np.int64)
        differs = found[:, 0] != low
        differs[wide] |= self._slots_high.take(slots[wide]) != high[wide]
        missed = np.flatnonzero(differs)
        if len(missed):
            missed = self._probe_again(ids, missed, low, high, slots)
        if len(missed):
            words = [text[start:end] for start, end in zip(starts[missed].tolist(), ends[missed].tolist(), strict=True)]
            new = self._learn(words)
            ids[missed] = [self._others[word] for word in words]
            if new:
                self._move_to_slots(dict(zip(words, missed.tolist(), strict=True)), new, low, high, slots)
        return ids

    def gather(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
        """Tokens of words, one after the other.

        Args:
            ids: word ids, int64 [words].

        Returns:
            Token ids [tokens], and the number of tokens of each word, int32 [words].
        """
        counts = self._counts.take(ids)
        rows = with_following(ids, counts)
        # One item of 8 or 16 bytes for each row: numpy gathers scalars much faster than short rows.
        packed = self._rows.view(_PACKED[self._rows.itemsize]).reshape(-1)
        flat = packed.take(rows).view(self._rows.dtype)
        return flat.compress(flat != self._blank), counts

    def _probe_again(
        self,
        ids: NDArray[np.int64],
        missed: NDArray[np.int64],
        low: NDArray[np.uint64],
        high: NDArray[np.uint64],
        slots: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Look into the second slot of the words missed in their first; fills `ids`, returns what is still missed."""
        second = slots[missed] ^ 1
        found = (self._slots_low[second] == low[missed]) & (self._slots_high[second] == high[missed])
        ids[missed[found]] = self._slots_id[second[found]]
        still: NDArray[np.int64] = missed[~found]
        return still

    def _learn(self, words: list[bytes]) -> list[bytes]:
        """Encode the words that are new into the dictionary; returns them."""
        new = list(dict.fromkeys(word for word in words if word not in self._others))
        if new:
            self._others.update(zip(new, self._learn_new(new).tolist(), strict=True))
        return new

    def _learn_new(self, words: list[bytes]) -> NDArray[np.int64]:
        """Encode and store words; returns their ids."""
        found = self._encode(words)
        ids = np.full(len(words), POISON, dtype=np.int64)
        alone = [tokens for tokens in found if tokens is not None]
        ids[[tokens is not None for tokens in found]] = self._add_all(alone)
        return ids

    def _move_to_slots(
        self,
        places: dict[bytes, int],
        new: list[bytes],
        low: NDArray[np.uint64],
        high: NDArray[np.uint64],
        slots: NDArray[np.int64],
    ) -> None:
        """Move new short words from the dictionary to the hash table, as far as their slots are free."""
        short = [word for word in new if len(word) <= _SHORT_BYTES]
        where = np.array([places[word] for word in short], dtype=np.int64)
        ids = np.array([self._others[word] for word in short], dtype=np.int64)
        for flip in (0, 1):
            slot = slots[where] ^ flip
            # Of two words for one slot the later takes it; the other one tries again or stays in the dictionary.
            free = self._slots_low[slot] == _NO_KEY
            self._slots_low[slot[free]] = low[where[free]]
            self._slots_high[slot[free]] = high[where[free]]
            self._slots_id[slot[free]] = ids[free]
            placed = free & (self._slots_low[slot] == low[where]) & (self._slots_high[slot] == high[where])
            for index in np.flatnonzero(placed).tolist():
                del self._others[short[index]]
            short = [short[index] for index in np.flatnonzero(~placed).tolist()]
            where, ids = where[~placed], ids[~placed]

    def _reserve(self, rows: int) -> None:
        have = len(self._rows)
        if rows <= have:
            return
        grown = max(rows, 2 * have)
        self._rows = np.concatenate([self._rows, np.full((grown - have, ROW), self._blank, dtype=self._rows.dtype)])
        self._counts = np.concatenate([self._counts, np.zeros(grown - have, dtype=np.int32)])


def spread(firsts: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Places of things of which some stand side by side from each of some places on."""
    places: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    return places


def with_following(rows: NDArray[np.int64], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rows of words, all rows of each word, given the first ones and how many tokens or pieces each word has."""
    large = np.flatnonzero(counts > ROW)
    if not len(large):
        return rows
    more = (counts.take(large) - 1) // ROW
    ends = np.cumsum(more)
    following = spread(large + 1 + ends - more, more)
    every = np.empty(len(rows) + int(ends[-1]), dtype=np.int64)
    is_first = np.ones(len(every), dtype=bool)
    is_first[following] = False
    every[is_first] = rows
    every[following] = spread(rows.take(large) + 1, more)
    return every


def _keys(
    text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    """Two integers for each word that no other word of up to 15 bytes has, and which words have more than 8 bytes.

    The first holds the first eight bytes, zero-filled, and alone tells words of up to eight bytes from all others: in
    longer words its upper byte is one that UTF-8 does not have, and the eighth byte stands behind the other seven in
    the second. Words of more than 15 bytes have a second integer that no word in the table has.
    """
    aligned = np.frombuffer(text + bytes(24 + -len(text) % 8), dtype="<u8")
    lengths = ends - starts
    low = _load(aligned, starts)
    low &= _KEEP.take(lengths, mode="clip")
    high = np.zeros(len(starts), dtype=np.uint64)
    wide = np.flatnonzero(lengths > 8)
    rest = lengths[wide] - 8
    upper = low[wide] & _UPPER_BYTE
    low[wide] |= _UPPER_BYTE
    behind = _load(aligned, starts[wide] + 8) & _KEEP.take(rest, mode="clip")
    high[wide] = np.where(rest > _SHORT_BYTES - 8, _NO_KEY, behind | upper)
    return low, high, wide


def _load(aligned: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Eight bytes from each offset. Two aligned loads make one: numpy would copy the window for an unaligned view."""
    index = offsets >> 3
    shift = (offsets & 7).view(np.uint64)
    shift <<= np.uint64(3)
    value: NDArray[np.uint64] = aligned.take(index)
    value >>= shift
    index += 1
    upper = aligned.take(index)
    # Shifting by 64 is undefined, so the upper part moves in two steps.
    upper <<= np.uint64(63) - shift
    upper <<= np.uint64(1)
    value |= upper
    return value


def _hash(low: NDArray[np.uint64], high: NDArray[np.uint64], wide: NDArray[np.int64]) -> NDArray[np.int64]:
    mixed = low * _MIX_LOW
    mixed[wide] ^= high[wide] * _MIX_HIGH
    mixed >>= np.uint64(64 - _SLOT_BITS)
    return mixed.view(np.int64)
