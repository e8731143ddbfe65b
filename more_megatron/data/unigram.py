"""How a unigram model segments a word, and why that can depend on the text before it.

SentencePiece adds up piece scores from the beginning of the text in 32-bit floats. Segmentations of a word differ in
their sum, and rounding at the size of the running total can turn a small difference around. So a word's segmentation
is that of the word alone only while the total is small against the gap to the next best one. Three facts tame this:

- In exact arithmetic the gap is known; rounding of n additions moves a sum by at most n/2 units in the last place.
- Between two powers of two the running total is a whole number of units, so adding a score adds its rounded number of
  units whatever the total is, unless the score lies exactly between two. There, one segmentation holds for the range.
- Beyond -100,000 the total starts again from zero (0.2.2 and later).

`UnigramLattice` answers all three questions by the search of `unigram_model.cc` (EncodeOptimized) in different
arithmetic.
"""

import math
import operator
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESET", "WEIGHT_UNIT", "WORST_ROUNDING", "Segmentation", "UnigramLattice", "float32", "limit_of_total"]

RESET = 100_000.0
"""Size of the running total beyond which the search starts again from zero."""

WORST_ROUNDING = 2.0**-8
"""Most that an addition to a running total short of `RESET` is off: half a unit in the last place."""

WEIGHT_UNIT = 2.0**-30
"""Unit in which the scores of words are added up beside the running total: whole numbers are summed much faster."""

_UNKNOWN_PENALTY = 10.0
_MANTISSA_BITS = 24
# Bytes of UTF-8 that do not begin a character.
_INNER_BYTES = range(0x80, 0xC0)
_FLOAT = struct.Struct("f")


@dataclass(frozen=True)
class Segmentation:
    """A word in pieces.

    Args:
        tokens: token ids.
        pieces: id of each piece that the search took; -1 for an unknown character.
        scores: score of each piece that the search took; unknown characters count one by one.
        limit: size of the running total before the word up to which this is its segmentation; negative if rounding
            decides even at the beginning of a text.
        deepest: lowest total at any place inside the word, relative to its beginning; at most 0.
    """

    tokens: list[int]
    pieces: list[int]
    scores: list[float]
    limit: float
    deepest: float


def float32(value: float) -> float:
    """Round to a 32-bit float."""
    result: float = _FLOAT.unpack(_FLOAT.pack(value))[0]
    return result


class UnigramLattice:
    """The segmentations of single words.

    Args:
        pieces: id and score of each ordinary piece; scores are at most 0.
        unknown: id of the unknown piece.
        byte_ids: ids of the 256 byte pieces, if unknown characters become bytes.
    """

    def __init__(self, pieces: dict[str, tuple[int, float]], unknown: int, byte_ids: list[int] | None) -> None:
        # Every piece and every beginning of one, so that one look-up tells whether to read on.
        self._pieces: dict[str, tuple[int, float]] = {
            piece[:length]: (-1, 0.0) for piece in pieces for length in range(1, len(piece))
        }
        self._pieces.update(pieces)
        self._unknown = unknown
        self._unknown_score = float32(min(score for _, score in pieces.values()) - _UNKNOWN_PENALTY)
        self._byte_ids = byte_ids

    @property
    def prefixes(self) -> Mapping[str, tuple[int, float]]:
        """Id and score of each piece and of each beginning of one; the id is -1 if that is no piece itself."""
        return self._pieces

    @property
    def token_scores(self) -> NDArray[np.float32]:
        """What each token id adds to the running total, unless it stands for several unknown characters.

        The first byte of an unknown character counts for all of them.
        """
        own = dict(self._pieces.values())
        own[self._unknown] = self._unknown_score
        for byte, token in enumerate(self._byte_ids or []):
            own[token] = 0.0 if byte in _INNER_BYTES else self._unknown_score
        own.pop(-1, None)
        scores = np.full(max(own) + 1, np.nan, dtype=np.float32)
        scores[list(own)] = list(own.values())
        return scores

    @property
    def merges_unknown(self) -> bool:
        """Whether unknown characters side by side become one token."""
        return self._byte_ids is None

    @property
    def unknown_score(self) -> float:
        """Score of a character that is no piece."""
        return self._unknown_score

    def segment(self, word: str) -> Segmentation:
        """Segment a word in exact arithmetic, and tell how far that holds.

        Args:
            word: normalised text with its U+2581.
        """
        search = self._search(word, 0.0, operator.add)
        tokens, ends = self._path(word, search)
        deepest = min(search.totals)
        gap = min((search.gaps[end] for end in ends), default=math.inf)
        return search.segmentation(tokens, ends, float(limit_of_total(gap, len(word), deepest)), deepest)

    def segment_in_range(self, word: str, exponent: int) -> Segmentation | None:
        """Segment a word that begins and ends at totals between -2**exponent and -2**(exponent - 1).

        Args:
            word: normalised text with its U+2581.
            exponent: the range.

        Returns:
            The segmentation, or None if a score lies between two units, so that it depends on the very total.
        """
        unit = 2.0 ** (exponent - _MANTISSA_BITS)
        halves = False

        def add(total: float, score: float) -> float:
            nonlocal halves
            steps = score / unit
            halves |= abs(steps - math.trunc(steps)) == 0.5
            return total + round(steps)

        search = self._search(word, 0.0, add)
        if halves:
            return None
        return search.segmentation(*self._path(word, search), 0.0, min(search.totals) * unit)

    def segment_at(self, word: str, total: float) -> tuple[list[int], float]:
        """Segment a word as SentencePiece does at a running total, starting again from zero where it does.

        Args:
            word: normalised text with its U+2581.
            total: the running total, a 32-bit float.

        Returns:
            Token ids, and the running total behind the word.
        """
        search = self._search(word, total, lambda before, score: float32(before + score), RESET)
        return self._path(word, search)[0], search.totals[-1]

    def _search(
        self, word: str, total: float, add: Callable[[float, float], float], reset: float = math.inf
    ) -> "_Search":
        size = len(word)
        totals = [math.nan] * (size + 1)
        starts = [-1] * (size + 1)
        pieces = [-1] * (size + 1)
        scores = [0.0] * (size + 1)
        gaps = [math.inf] * (size + 1)
        totals[0] = total
        known = self._pieces.get
        for start in range(size):
            if -totals[start] > reset:
                _shift(totals, start, add)
            here = totals[start]
            end = start + 1
            found = known(word[start:end])
            if found is None or found[0] < 0:
                found, follows = (-1, self._unknown_score), found
            else:
                follows = found
            while found is not None:
                piece, score = found
                if piece >= 0 or end == start + 1:
                    offered = add(here, score)
                    if starts[end] < 0:
                        totals[end], starts[end], pieces[end], scores[end] = offered, start, piece, score
                    elif offered > totals[end]:
                        gaps[end] = offered - totals[end]
                        totals[end], starts[end], pieces[end], scores[end] = offered, start, piece, score
                    elif totals[end] - offered < gaps[end]:
                        gaps[end] = totals[end] - offered
                end += 1
                found = known(word[start:end]) if follows is not None and end <= size else None
        return _Search(totals, starts, pieces, scores, gaps)

    def _path(self, word: str, search: "_Search") -> tuple[list[int], list[int]]:
        """Tokens of the best way, and the places behind its pieces."""
        ends = []
        end = len(word)
        while end > 0:
            ends.append(end)
            end = search.starts[end]
        ends.reverse()
        tokens: list[int] = []
        was_unknown = False
        for end in ends:
            piece = search.pieces[end]
            if piece >= 0:
                tokens.append(piece)
            elif self._byte_ids is not None:
                tokens += [self._byte_ids[byte] for byte in word[search.starts[end] : end].encode()]
            elif not was_unknown:
                tokens.append(self._unknown)
            was_unknown = piece < 0
        return tokens, ends


@dataclass(frozen=True)
class _Search:
    """The best way to each place of a word: its total, last piece and that piece's start, and the gap to the second."""

    totals: list[float]
    starts: list[int]
    pieces: list[int]
    scores: list[float]
    gaps: list[float]

    def segmentation(self, tokens: list[int], ends: list[int], limit: float, deepest: float) -> Segmentation:
        """The best way with what is known of it."""
        pieces, scores = [self.pieces[end] for end in ends], [self.scores[end] for end in ends]
        return Segmentation(tokens, pieces, scores, limit, deepest)


def limit_of_total(
    gap: float | NDArray[np.float64], size: int | NDArray[np.int64], deepest: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Largest total before a word of `size` characters with which rounding cannot close a gap.

    Each of the two sums compared is off by at most half a unit for each character, so the gap must exceed `size` units.
    Totals below 2**exponent have units of at most 2**(exponent - 24), and the totals inside the word must be below too.
    """
    unit = gap / np.maximum(size, 1) - 1e-9
    exponent = np.where(np.isinf(unit), 1000, np.frexp(unit)[1] - 1 + _MANTISSA_BITS)
    limit: NDArray[np.float64] = np.where(unit > 0, np.ldexp(1.0, exponent) + deepest - 1.0, -1.0)
    return limit


def _shift(totals: list[float], start: int, add: Callable[[float, float], float]) -> None:
    offset = totals[start]
    for place in range(start, len(totals)):
        # Places that nothing has reached yet are not numbers and stay so.
        totals[place] = add(totals[place], -offset)
