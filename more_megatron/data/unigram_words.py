"""Words of a unigram model, each in the segmentation that its place in the document calls for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.unigram import RESET, UnigramLattice
from more_megatron.data.unigram_batch import Segmentations, WordBatches
from more_megatron.data.wordencoder import CutRule, WordEncoder
from more_megatron.data.wordtable import POISON, WordTable, WordTokens

__all__ = ["UnigramEncoder", "UnigramTable", "search_is_known"]

_KNOWN_VERSIONS = ("0.2.3",)
# Words of a document that are bounded at a time: what lies behind a new start is bounded again.
_MOST_FOLLOWED = 1 << 14
# As many words as take the same time together as one by one.
_BATCH = 24
# More than what rounding inside a word can add up to.
_SPARE = 1.0


def search_is_known(version: str) -> bool:
    """Whether SentencePiece of this version searches as `UnigramLattice` does, its start from zero included."""
    return version in _KNOWN_VERSIONS


class UnigramTable(WordTable):
    """Words with what `UnigramLattice` says of them.

    Args:
        encode: see `WordTable`.
        dtype: see `WordTable`.
        lattice: the model's segmentations.
        normalize: gives a word's normalised text with its U+2581.

    Attributes:
        weights: sum of the scores of each word with its sign changed, float64 [ids].
        limits: size of the running total up to which each word's tokens hold, float64 [ids].
        limited: whether that is less than `RESET`, bool [ids].
        depths: how far the running total falls inside each word, at most 0, float64 [ids].
        deepest: the least of them.
    """

    def __init__(
        self,
        encode: Callable[[list[bytes]], list[WordTokens]],
        dtype: np.dtype,
        lattice: UnigramLattice,
        normalize: Callable[[bytes], str],
    ) -> None:
        self.lattice = lattice
        self._normalize = normalize
        self._batches: WordBatches | None = None
        self.weights = np.zeros(1024)
        self.limits = np.full(1024, np.inf)
        self.limited = np.zeros(1024, dtype=bool)
        self.depths = np.zeros(1024)
        self._spans = np.zeros((1024, 2), dtype=np.int64)
        self._scores = np.zeros(1024, dtype=np.float32)
        self._texts: dict[int, str] = {}
        self._variants: dict[tuple[int, int], int | None] = {}
        self._searched: dict[tuple[int, tuple[int, ...]], int] = {}
        super().__init__(encode, dtype)

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self.deepest = 0.0
        self._scores_used = 0
        self._texts.clear()
        self._variants.clear()
        self._searched.clear()

    def _reserve(self, rows: int) -> None:
        super()._reserve(rows)
        size = len(self._counts)
        if size > len(self.weights):
            self.weights, self.limits, self.depths, self.limited = (
                np.resize(facts, size) for facts in (self.weights, self.limits, self.depths, self.limited)
            )
            self._spans = np.resize(self._spans, (size, 2))

    def _add_all(self, words: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        ids = super()._add_all(words)
        self._keep(ids, Segmentations.empty(len(ids)))
        return ids

    def _added(self, words: list[bytes], ids: NDArray[np.int64]) -> None:
        texts = [self._normalize(word) for word in words]
        self._texts.update(zip(ids.tolist(), texts, strict=True))
        if len(texts) >= _BATCH:
            if self._batches is None:
                self._batches = WordBatches(self.lattice.prefixes, self.lattice.unknown_score)
            self._keep(ids, self._batches.segment(texts))
        else:
            self._keep(ids, Segmentations.of([self.lattice.segment(text) for text in texts]))

    def _keep(self, ids: NDArray[np.int64], found: Segmentations) -> None:
        ends = np.cumsum(found.counts) + self._scores_used
        last = int(ends[-1])
        if last > len(self._scores):
            self._scores = np.resize(self._scores, 2 * last)
        self._scores[self._scores_used : last] = found.scores
        self._scores_used = last
        self._spans[ids, 0] = ends - found.counts
        self._spans[ids, 1] = found.counts
        self.weights[ids] = found.weights
        self.limits[ids] = found.limits
        self.limited[ids] = found.limits < RESET
        self.depths[ids] = found.depths
        self.deepest = min(self.deepest, float(found.depths.min()))

    def between(self, word_id: int, least: float, most: float) -> int | None:
        """Id of a word in its segmentation at all running totals of two sizes and between; None if they differ.

        Two powers of two must enclose the sizes, and that at each place of the word, which must not reach `RESET`.
        """
        exponent = math.frexp(least)[1]
        variant = self._variant(word_id, exponent)
        if variant is None or most - self.depths[variant] >= min(2.0**exponent, RESET) - _SPARE:
            return None
        return variant

    def _variant(self, word_id: int, exponent: int) -> int | None:
        """Id of a word in its segmentation for totals between two powers of two; None if they do not decide it."""
        key = (word_id, exponent)
        if key not in self._variants:
            found = self.lattice.segment_in_range(self._texts[word_id], exponent)
            self._variants[key] = None
            if found is not None:
                self._variants[key] = variant = self.add(found.tokens)
                self._keep(np.array([variant]), Segmentations.of([replace(found, limit=math.inf)]))
        return self._variants[key]

    def at(self, word_id: int, total: float) -> tuple[int, float]:
        """Id of a word in its segmentation at a running total, and the total behind it."""
        variant = self.between(word_id, -total, -total) if total < 0 else None
        if variant is not None:
            return variant, float(self.totals(np.array([variant]), total)[-1])
        tokens, after = self.lattice.segment_at(self._texts[word_id], total)
        key = (word_id, tuple(tokens))
        if key not in self._searched:
            self._searched[key] = self.add(tokens)
        return self._searched[key], after

    def totals(self, ids: NDArray[np.int64], total: float) -> NDArray[np.float32]:
        """Running total before each word and behind the last, as 32-bit additions make it, float32 [words + 1]."""
        firsts, counts = self._spans.take(ids, axis=0).T
        ends = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(ends[-1]) + np.repeat(firsts - ends[:-1], counts)
        scores = self._scores.take(places)
        running: NDArray[np.float32] = np.add.accumulate(np.concatenate([np.array([total], np.float32), scores]))
        return running.take(ends)


class UnigramEncoder(WordEncoder):
    """Encodes documents by words with a unigram model, exactly as SentencePiece encodes them whole.

    Most words of most documents have one segmentation whatever stands before them. Documents with others, and those
    long enough to make SentencePiece start again from zero, are followed: sums of words in exact arithmetic bound the
    running total well enough for most words, and it is added up as SentencePiece does only where it must be known.

    Args:
        rule: see `WordEncoder`.
        encode_words: see `WordEncoder`.
        encode_whole: see `WordEncoder`.
        dtype: see `WordEncoder`.
        eod: see `WordEncoder`.
        lattice: the model's segmentations.
        normalize: gives a word's normalised text with its U+2581.
        rounding: bound on the relative error of a running total.
        known_search: whether long documents can be followed; otherwise they are encoded whole.
    """

    def __init__(
        self,
        rule: CutRule,
        encode_words: Callable[[list[bytes]], list[WordTokens]],
        encode_whole: Callable[[str], Sequence[int] | NDArray[np.integer]],
        dtype: np.dtype,
        eod: int | None,
        lattice: UnigramLattice,
        normalize: Callable[[bytes], str],
        rounding: float,
        known_search: bool,
    ) -> None:
        self._lattice = lattice
        self._normalize = normalize
        self._rounding = rounding
        # Twice the rounding: once for the additions, once for words whose segmentation is not the best one.
        self._over = (1.0 + rounding) ** 2
        self._under = (1.0 - rounding) ** 2
        self._known_search = known_search
        # Running total of a document that goes on in the next window.
        self._carried: float | None = None
        super().__init__(rule, encode_words, encode_words, encode_whole, dtype, eod)

    def _make_table(self, encode_words: Callable[[list[bytes]], list[WordTokens]], dtype: np.dtype) -> WordTable:
        self._words = UnigramTable(encode_words, dtype, self._lattice, self._normalize)
        return self._words

    def _settle(self, ids: NDArray[np.int64], closes: NDArray[np.int64]) -> None:
        words = self._words
        first = np.concatenate([[0], closes + 1])
        last = np.concatenate([closes, [len(ids)]])
        limited = np.flatnonzero(words.limited.take(ids))
        # Sums between the places that matter; the last is behind all words.
        marks = np.unique(np.concatenate([first, limited, [len(ids)]]))
        sums = np.add.reduceat(np.append(words.weights.take(ids), 0.0), marks)
        before = np.cumsum(sums) - sums
        origins = before[np.searchsorted(marks, first)]
        ends = np.append(origins[1:], before[-1]) - origins
        owners = np.searchsorted(first, limited, side="right") - 1
        starts = before[np.searchsorted(marks, limited)] - origins[owners]
        follow = ends * self._over - words.deepest >= RESET - _SPARE
        follow[0] |= self._carried is not None
        follow[-1] |= first[-1] < len(ids)
        chosen = self._doubtful(ids, limited, starts) & ~follow[owners]
        for document in np.unique(owners[chosen]).tolist():
            here = chosen & (owners == document)
            variants = self._variants(ids, limited[here], starts[here])
            follow[document] = len(variants) < np.count_nonzero(here)
            if not follow[document]:
                ids[limited[here]] = variants
        for document in np.flatnonzero(follow).tolist():
            goes_on = document == len(closes)
            total = self._carried if document == 0 else None
            after = self._follow(ids[first[document] : last[document]], total or 0.0, goes_on)
            self._carried = after if goes_on else None

    def _doubtful(
        self, ids: NDArray[np.int64], places: NDArray[np.int64], starts: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which of some words may need other tokens than their own at totals of some sizes in exact arithmetic."""
        # At the very beginning the total is 0 and a word's own tokens are those of the text.
        return (starts * self._over > self._words.limits.take(ids[places])) & (starts > 0.0)

    def _variants(self, ids: NDArray[np.int64], places: NDArray[np.int64], starts: NDArray[np.float64]) -> list[int]:
        """Other segmentations of doubtful words of a document, as many of them as bounds on the running total decide.

        The total before a word lies near the sum of the words before in exact arithmetic and their own segmentations.
        It is off by the rounding of its additions, which `rounding` bounds, and by what words chosen here score less,
        which is watched to stay below the same bound.

        Args:
            ids: words.
            places: the doubtful ones.
            starts: size of the running total before each of them in exact arithmetic.
        """
        words = self._words
        variants: list[int] = []
        if not self._known_search:
            return variants
        strayed = 0.0
        for word_id, start in zip(ids[places].tolist(), starts.tolist(), strict=True):
            variant = words.between(word_id, start * self._under, start * self._over)
            if variant is None:
                break
            strayed += abs(words.weights[variant] - words.weights[word_id])
            if strayed > start * self._rounding:
                break
            variants.append(variant)
        return variants

    def _follow(self, ids: NDArray[np.int64], total: float, goes_on: bool) -> float:
        """Choose the words of a document that depend on what stands before them, or mark them to be encoded whole.

        Args:
            ids: the words of the document in this window, changed in place.
            total: running total before them.
            goes_on: whether the total behind them is wanted.

        Returns:
            The running total behind them, if it is wanted.
        """
        if not self._known_search:
            ids[:] = POISON
        if POISON in ids:
            return 0.0
        words = self._words
        done = 0
        while done < len(ids):
            rest = ids[done : done + _MOST_FOLLOWED]
            part, stop, sure = self._bounded(rest, total)
            if stop == sure == len(ids) - done and not goes_on:
                ids[done:] = part
                break
            totals = words.totals(part[:stop], total)
            restarts = np.flatnonzero(-totals[sure:-1] - words.depths.take(part[sure:stop]) >= RESET - _SPARE)
            stop = sure + int(restarts[0]) if len(restarts) else stop
            ids[done : done + stop] = part[:stop]
            total = float(totals[stop])
            done += stop
            if stop < len(rest):
                ids[done], total = words.at(int(ids[done]), total)
                done += 1
        return total

    def _bounded(self, ids: NDArray[np.int64], total: float) -> tuple[NDArray[np.int64], int, int]:
        """Choose words by bounds on the running total, as far as the bounds decide.

        Args:
            ids: words of a document.
            total: running total before them, a 32-bit float.

        Returns:
            The words with their segmentations, how many of them are settled if SentencePiece does not start again from
            zero before, and how many stand where it certainly does not.
        """
        words = self._words
        weights = words.weights.take(ids)
        starts = np.cumsum(weights)
        starts -= weights
        starts -= total
        sure, stop = np.searchsorted(starts, [(RESET - _SPARE + words.deepest) / self._over, RESET / self._under])
        part = ids[:stop].copy()
        places = np.flatnonzero(words.limited.take(part))
        places = places[self._doubtful(part, places, starts[places])]
        variants = self._variants(part, places, starts[places])
        part[places[: len(variants)]] = variants
        if len(variants) < len(places):
            stop = places[len(variants)]
        return part, int(stop), int(min(sure, stop))
