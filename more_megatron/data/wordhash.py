"""Words of up to 15 bytes as integers, and a hash table that finds many of them at once.

The table is one of open addressing with linear probing, in arrays of numpy: a look-up compares keys and is exact, and
costs a few dozen calls for any number of words. Where numpy offers two ways, `take` and `compress` are used: they are
several times faster than indexing with arrays of integers and booleans.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["WordHash", "WordKeys"]

_SHORT_BYTES = 15
_MIX_LOW = np.uint64(0x9E3779B97F4A7C15)
_MIX_HIGH = np.uint64(0xC2B2AE3D27D4EB4F)
_KEEP = np.array([(1 << (8 * count)) - 1 for count in range(9)], dtype=np.uint64)
# UTF-8 has no such bytes, so no word has this as its key, and no word of up to 8 bytes has the upper byte.
_NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
_UPPER_BYTE = np.uint64(0xFF00000000000000)


@dataclass(frozen=True)
class WordKeys:
    """Two integers for each word that no other word of up to 15 bytes has.

    The first holds the first eight bytes, zero-filled, and alone tells words of up to eight bytes from all others: in
    longer words its upper byte is one that UTF-8 does not have, and the eighth byte stands behind the other seven in
    the second. Words of more than 15 bytes share a second integer that no other word has.

    Args:
        low: the first integers, uint64 [words].
        high: the second integers, uint64 [words].
        wide: places of the words of more than 8 bytes.
    """

    low: NDArray[np.uint64]
    high: NDArray[np.uint64]
    wide: NDArray[np.int64]

    @classmethod
    def of(cls, text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> "WordKeys":
        """Read words from a text without NUL bytes, given the first byte of each and the byte after it."""
        padded = text + bytes(24)
        # All overlapping groups of eight bytes; as opaque items, of which numpy asks no alignment.
        windows = np.ndarray(len(text) + 17, dtype="V8", buffer=padded, strides=(1,))
        lengths = ends - starts
        low = windows[starts].view(np.uint64)
        low &= _KEEP.take(lengths, mode="clip")
        high = np.zeros(len(starts), dtype=np.uint64)
        wide = np.flatnonzero(lengths > 8)
        rest = lengths[wide] - 8
        upper = low[wide] & _UPPER_BYTE
        low[wide] |= _UPPER_BYTE
        behind = windows[starts[wide] + 8].view(np.uint64) & _KEEP.take(rest, mode="clip")
        high[wide] = np.where(rest > _SHORT_BYTES - 8, _NO_KEY, behind | upper)
        return cls(low, high, wide)

    def are_long(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which words have more than 15 bytes."""
        are_long: NDArray[np.bool_] = self.high.take(places) == _NO_KEY
        return are_long


class WordHash:
    """Ids of words of up to 15 bytes.

    Args:
        slot_bits: logarithm of the number of slots, of which words should take no more than half.
    """

    def __init__(self, slot_bits: int) -> None:
        self._slot_bits = slot_bits
        # First key and id side by side, so that most words are found by one access to memory.
        self._slots = np.full((1 << slot_bits, 2), _NO_KEY)
        self._low, self._ids = self._slots.T
        self._high = np.zeros(1 << slot_bits, dtype=np.uint64)
        self._count = 0

    def clear(self) -> None:
        """Forget all words."""
        if self._count:
            self._low[:] = _NO_KEY
            self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, keys: WordKeys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look words up.

        Returns:
            Their ids, int64 [words], and the places of those that are not in the table, of which the ids mean nothing.
        """
        slots = self._first_slots(keys.low, keys.high, keys.wide)
        found = self._slots.take(slots, axis=0)
        ids = found[:, 1].astype(np.int64)
        differs = found[:, 0] != keys.low
        differs[keys.wide] |= self._high.take(slots[keys.wide]) != keys.high[keys.wide]
        missed = np.flatnonzero(differs)
        others = missed[(found[:, 0].take(missed) != _NO_KEY) & ~keys.are_long(missed)]
        distance = 0
        while len(others):
            distance += 1
            here = (slots.take(others) + distance) & (len(self._high) - 1)
            low = self._low[here]
            hit = (low == keys.low.take(others)) & (self._high.take(here) == keys.high.take(others))
            ids[others[hit]] = self._ids[here[hit]]
            differs[others[hit]] = False
            others = others[~hit & (low != _NO_KEY)]
        return ids, missed[differs.take(missed)]

    def insert(self, keys: WordKeys, places: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Add words, each once and none of them in the table.

        Args:
            keys: of some words.
            places: the words among them to add.
            ids: their ids.
        """
        self._count += len(places)
        low, high = keys.low[places], keys.high[places]
        slots = self._first_slots(low, high, slice(None))
        while len(slots):
            free = np.flatnonzero(self._low[slots] == _NO_KEY)
            self._low[slots[free]] = low[free]
            self._high[slots[free]] = high[free]
            self._ids[slots[free]] = ids[free]
            # Of two words for one slot the later has taken it.
            moves = (self._low[slots] != low) | (self._high[slots] != high)
            low, high, ids, slots = low[moves], high[moves], ids[moves], (slots[moves] + 1) & (len(self._high) - 1)

    def _first_slots(
        self, low: NDArray[np.uint64], high: NDArray[np.uint64], wide: NDArray[np.int64] | slice
    ) -> NDArray[np.int64]:
        mixed = low * _MIX_LOW
        mixed[wide] ^= high[wide] * _MIX_HIGH
        mixed >>= np.uint64(64 - self._slot_bits)
        return mixed.view(np.int64)
