"""The segmentations of many words of a unigram model at once, in exact arithmetic.

The search is that of `UnigramLattice.segment`, one step for the n-th characters of all words together, so that the
words of a first window cost some hundred numpy calls and not a loop over the pieces of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.unigram import Segmentation, limit_of_total

__all__ = ["Segmentations", "WordBatches"]

_CHARACTER_BITS = 21


@dataclass(frozen=True)
class Segmentations:
    """Words in pieces; see `Segmentation`.

    Args:
        pieces: id of each piece, word after word, -1 for an unknown character, int64 [pieces].
        scores: score of each piece, float32 [pieces].
        counts: pieces of each word, int64 [words].
        weights: sum of each word's scores with its sign changed, float64 [words].
        limits: size of the running total up to which each segmentation holds, float64 [words].
        depths: lowest total inside each word, float64 [words].
    """

    pieces: NDArray[np.int64]
    scores: NDArray[np.float32]
    counts: NDArray[np.int64]
    weights: NDArray[np.float64]
    limits: NDArray[np.float64]
    depths: NDArray[np.float64]

    @classmethod
    def of(cls, words: Sequence[Segmentation]) -> "Segmentations":
        """Put words together that were segmented one by one."""
        return cls(
            pieces=np.array([piece for word in words for piece in word.pieces], dtype=np.int64),
            scores=np.array([score for word in words for score in word.scores], dtype=np.float32),
            counts=np.array([len(word.scores) for word in words], dtype=np.int64),
            weights=np.array([-sum(word.scores) for word in words]),
            limits=np.array([word.limit for word in words]),
            depths=np.array([word.deepest for word in words]),
        )

    @property
    def sure(self) -> NDArray[np.bool_]:
        """Words whose pieces are their tokens at the beginning of a text, bool [words]."""
        sure = self.limits >= 0.0
        sure[self._owners[self.pieces < 0]] = False
        return sure

    @property
    def merging(self) -> NDArray[np.bool_]:
        """Words with unknown characters side by side, bool [words]."""
        merging = np.zeros(len(self.counts), dtype=bool)
        unknown, owners = self.pieces < 0, self._owners
        merging[owners[1:][unknown[1:] & unknown[:-1] & (owners[1:] == owners[:-1])]] = True
        return merging

    @property
    def _owners(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class _Edges:
    """Pieces that stand in the words, in the order of where in their word they begin.

    Args:
        starts: place before each piece.
        ends: place behind it.
        nodes: the piece.
        bounds: number of edges that begin before the n-th character of their word.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    nodes: NDArray[np.int64]
    bounds: list[int]


class WordBatches:
    """Segments words with the pieces of a unigram model.

    Args:
        prefixes: id and score of each piece and of each beginning of one; the id is -1 if that is no piece itself.
        unknown_score: score of a character that is no piece.
    """

    def __init__(self, prefixes: Mapping[str, tuple[int, float]], unknown_score: float) -> None:
        nodes = {prefix: node for node, prefix in enumerate(prefixes, start=1)}
        nodes[""] = 0
        keys = np.array([(nodes[prefix[:-1]] << _CHARACTER_BITS) + ord(prefix[-1]) for prefix in prefixes])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._nodes = order + 1
        # The first node stands for nothing read, and for a character that is no piece.
        self._pieces = np.array([-1, *(piece for piece, _ in prefixes.values())])
        self._scores = np.array([unknown_score, *(score for _, score in prefixes.values())])

    def segment(self, words: Sequence[str]) -> Segmentations:
        """Segment words.

        Args:
            words: normalised texts with their U+2581.
        """
        sizes = np.array([len(word) for word in words])
        # A word of n characters has n + 1 places.
        last = np.cumsum(sizes + 1) - 1
        first = last - sizes
        edges = self._edges(words, sizes)
        count = len(words) + int(sizes.sum())
        totals = np.full(count, -np.inf)
        totals[first] = 0.0
        gaps = np.full(count, np.inf)
        scores = self._scores.take(edges.nodes)
        taken = np.zeros(count, dtype=np.int64)
        for begin, end in zip(edges.bounds, edges.bounds[1:], strict=False):
            # No two of these pieces end at the same place.
            starts, ends = edges.starts[begin:end], edges.ends[begin:end]
            offered = totals.take(starts) + scores[begin:end]
            best = totals.take(ends)
            better = offered > best
            gaps[ends] = np.where(better, offered - best, np.minimum(gaps.take(ends), best - offered))
            totals[ends] = np.maximum(offered, best)
            taken[ends.compress(better)] = np.flatnonzero(better) + begin
        on_path, least = _paths(first, last, edges.starts, taken, gaps)
        nodes = edges.nodes.take(taken.compress(on_path))
        depths = np.minimum.reduceat(totals, first)
        return Segmentations(
            pieces=self._pieces.take(nodes),
            scores=self._scores.take(nodes).astype(np.float32),
            counts=np.add.reduceat(on_path, first, dtype=np.int64),
            weights=-totals[last],
            limits=limit_of_total(least, sizes, depths),
            depths=depths,
        )

    def _edges(self, words: Sequence[str], sizes: NDArray[np.int64]) -> _Edges:
        codes = np.frombuffer("".join(words).encode("utf-32-le"), dtype="<u4").astype(np.int64)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.arange(len(codes)) - (np.cumsum(sizes) - sizes)[owners]
        left = sizes[owners] - offsets
        unknown = np.ones(len(codes), dtype=bool)
        starts, lengths, ended = [], [], []
        chars = np.arange(len(codes))
        nodes = np.zeros(len(codes), dtype=np.int64)
        length = 0
        while len(chars):
            keys = (nodes << _CHARACTER_BITS) + codes.take(chars + length)
            places = np.searchsorted(self._keys, keys)
            known = self._keys.take(places, mode="clip") == keys
            chars, nodes = chars.compress(known), self._nodes.take(places.compress(known))
            length += 1
            pieces = self._pieces.take(nodes) >= 0
            starts.append(chars.compress(pieces))
            if length == 1:
                unknown[starts[-1]] = False
            lengths.append(np.full(len(starts[-1]), length))
            ended.append(nodes.compress(pieces))
            more = left.take(chars) > length
            chars, nodes = chars.compress(more), nodes.compress(more)
        starts.append(np.flatnonzero(unknown))
        lengths.append(np.ones(len(starts[-1]), dtype=np.int64))
        ended.append(np.zeros(len(starts[-1]), dtype=np.int64))
        first = np.concatenate(starts)
        # Two bytes, more than a word has characters: numpy sorts them by counting.
        order = np.argsort(offsets.astype(np.uint16).take(first), kind="stable")
        first = first.take(order)
        bounds = np.searchsorted(offsets.take(first), np.arange(sizes.max(initial=0) + 1))
        before = first + owners.take(first)
        ends = before + np.concatenate(lengths).take(order)
        return _Edges(before, ends, np.concatenate(ended).take(order), bounds.tolist())


def _paths(
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    starts: NDArray[np.int64],
    taken: NDArray[np.int64],
    gaps: NDArray[np.float64],
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Places behind the pieces of each word's best way, and the least gap to a second one on it."""
    on_path = np.zeros(len(gaps), dtype=bool)
    least = np.full(len(first), np.inf)
    words = np.flatnonzero(first < last)
    here = last[words]
    while len(words):
        on_path[here] = True
        least[words] = np.minimum(least[words], gaps[here])
        here = starts.take(taken.take(here))
        inside = here > first[words]
        words, here = words[inside], here[inside]
    return on_path, least
