"""Words of a unigram model, each in the segmentation that its place in the document calls for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.sentencepiece_words import SentencePieceWords
from more_megatron.data.unigram import RESET, WEIGHT_UNIT, Segmentation, UnigramLattice
from more_megatron.data.unigram_batch import Segmentations, WordBatches
from more_megatron.data.wordencoder import CutRule, WordEncoder
from more_megatron.data.wordtable import POISON, ROW, EncodeWords, WordTable, spread, with_following

__all__ = ["UnigramEncoder", "UnigramTable", "search_is_known"]

_KNOWN_VERSIONS = ("0.2.3",)
# No score is larger than 0.
_NO_SCORE = np.float32(1.0)
# As many words as take the same time together as one by one.
_BATCH = 24
# SentencePiece is quick with unigram models.
_LEARN_SHARE = 0.03
# More than what rounding inside a word can add up to.
_SPARE = 1.0


def search_is_known(version: str) -> bool:
    """Whether SentencePiece of this version searches as `UnigramLattice` does, its start from zero included."""
    return version in _KNOWN_VERSIONS


class UnigramTable(WordTable):
    """Words with what `UnigramLattice` says of them.

    Args:
        source: encodes and normalises words.
        dtype: see `WordTable`.
        lattice: the model's segmentations.

    Attributes:
        weights: sum of the scores of each word with its sign changed, in units of `WEIGHT_UNIT`, int64 [ids].
        limits: size of the running total up to which each word's tokens hold, float64 [ids].
        limited: whether that is less than `RESET`, bool [ids].
        depths: how far the running total falls inside each word, at most 0, float64 [ids].
        deepest: the least of them.
    """

    def __init__(
        self,
        source: SentencePieceWords,
        dtype: np.dtype,
        lattice: UnigramLattice,
    ) -> None:
        self.lattice = lattice
        self._source = source
        self._batches: WordBatches | None = None
        self.weights = np.zeros(1024, dtype=np.int64)
        self.limits = np.full(1024, np.inf)
        self.limited = np.zeros(1024, dtype=bool)
        self.depths = np.zeros(1024)
        self._score_rows = np.zeros((1024, ROW), dtype=np.float32)
        self._first_rows = np.zeros(1024, dtype=np.int64)
        self._pieces = np.zeros(1024, dtype=np.int64)
        self._texts: dict[int, str] = {}
        self._variants: dict[tuple[int, int], int | None] = {}
        self._searched: dict[tuple[int, tuple[int, ...]], int] = {}
        super().__init__(source.words, dtype)

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self.deepest = 0.0
        self._score_rows_used = 0
        self._texts.clear()
        self._variants.clear()
        self._searched.clear()

    def _reserve(self, rows: int) -> None:
        super()._reserve(rows)
        size = len(self._counts)
        if size > len(self.weights):
            self.weights, self._first_rows, self._pieces = (
                np.resize(facts, size) for facts in (self.weights, self._first_rows, self._pieces)
            )
            self.limits, self.depths = np.resize(self.limits, size), np.resize(self.depths, size)
            self.limited = np.resize(self.limited, size)

    def add(self, tokens: Sequence[int]) -> int:
        """Store a word that no text can spell; it adds nothing to the running total."""
        word_id = super().add(tokens)
        self._keep(np.array([word_id]), Segmentations.of([Segmentation([], [], [], math.inf, 0.0)]))
        return word_id

    def _learn_new(self, words: list[bytes]) -> NDArray[np.int64]:
        ids = np.full(len(words), POISON, dtype=np.int64)
        plain = self._source.are_plain(words)
        self._ask(words, ids, np.flatnonzero(~plain))
        kept = np.flatnonzero(plain | (ids != POISON))
        texts = self._source.normal([words[index] for index in kept.tolist()], plain[kept].tolist())
        found = self._segment(texts)
        # SentencePiece need not be asked for tokens that the segmentation leaves no doubt of.
        clear = found.sure & plain[kept]
        ids[kept[clear]] = self._store(found.pieces[np.repeat(clear, found.counts)], found.counts[clear])
        self._ask(words, ids, kept[plain[kept] & ~clear])
        self._texts.update(zip(ids[kept].tolist(), texts, strict=True))
        self._keep(ids[kept], found)
        return ids

    def _ask(self, words: list[bytes], ids: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Have SentencePiece encode some of the words, and fill in their ids."""
        if len(places):
            ids[places] = super()._learn_new([words[index] for index in places.tolist()])

    def _segment(self, texts: list[str]) -> Segmentations:
        if len(texts) < _BATCH:
            return Segmentations.of([self.lattice.segment(text) for text in texts])
        if self._batches is None:
            self._batches = WordBatches(self.lattice.prefixes, self.lattice.unknown_score)
        return self._batches.segment(texts)

    def _keep(self, ids: NDArray[np.int64], found: Segmentations) -> None:
        if not len(ids):
            return
        rows = np.maximum(1, -(-found.counts // ROW))
        ends = np.cumsum(rows) + self._score_rows_used
        last = int(ends[-1])
        if last > len(self._score_rows):
            self._score_rows = np.resize(self._score_rows, (2 * last, ROW))
        self._score_rows[self._score_rows_used : last] = _NO_SCORE
        self._score_rows.reshape(-1)[spread((ends - rows) * ROW, found.counts)] = found.scores
        self._score_rows_used = last
        self._first_rows[ids] = ends - rows
        self._pieces[ids] = found.counts
        self.weights[ids] = np.rint(found.weights / WEIGHT_UNIT)
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
                self._variants[key] = variant = super().add(found.tokens)
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

    def totals(self, ids: NDArray[np.int64], total: float, start: int = 0) -> NDArray[np.float32]:
        """Running totals as 32-bit additions make them.

        Args:
            ids: words.
            total: running total before them.
            start: the first word of which the total is asked for.

        Returns:
            The totals before each word from that one on and behind the last, float32 [words - start + 1].
        """
        counts = self._pieces.take(ids)
        rows = with_following(self._first_rows.take(ids), counts)
        scores = self._score_rows.view(np.complex128).reshape(-1).take(rows).view(np.float32)
        running = np.concatenate([np.array([total], np.float32), scores.compress(scores != _NO_SCORE)])
        np.add.accumulate(running, out=running)
        behind = np.cumsum(counts[start:])
        return running[len(running) - 1 - int(behind[-1] if len(behind) else 0) :].take(np.append(0, behind))


@dataclass(frozen=True)
class _Span:
    """Words of one document that stand in one window.

    Args:
        ids: the words, int64 [words].
        before: sum of the weights of the window's words before each of them and behind the last, int64 [words + 1].
        limited: places of words whose tokens do not hold at all running totals, int64 [places].
    """

    ids: NDArray[np.int64]
    before: NDArray[np.int64]
    limited: NDArray[np.int64]


class UnigramEncoder(WordEncoder):
    """Encodes documents by words with a unigram model, exactly as SentencePiece encodes them whole.

    Most words of most documents have one segmentation whatever stands before them. Documents with others, and those
    long enough to make SentencePiece start again from zero, are followed: sums of words in exact arithmetic bound the
    running total well enough for most words, and it is added up as SentencePiece does only where it must be known.

    Args:
        rule: see `WordEncoder`.
        source: encodes and normalises words.
        dtype: see `WordEncoder`.
        eod: see `WordEncoder`.
        lattice: the model's segmentations.
        rounding: bound on the relative error of a running total.
        known_search: whether long documents can be followed; otherwise they are encoded whole.
    """

    def __init__(
        self,
        rule: CutRule,
        source: SentencePieceWords,
        dtype: np.dtype,
        eod: int | None,
        lattice: UnigramLattice,
        rounding: float,
        known_search: bool,
    ) -> None:
        self._lattice = lattice
        self._source = source
        self._rounding = rounding
        # Twice the rounding: once for the additions, once for words whose segmentation is not the best one.
        self._over = (1.0 + rounding) ** 2
        self._under = (1.0 - rounding) ** 2
        self._known_search = known_search
        # Running total of a document that goes on in the next window.
        self._carried: float | None = None
        super().__init__(rule, source.words, source.words, source.whole, dtype, eod, learn_share=_LEARN_SHARE)

    def _make_table(self, encode_words: EncodeWords, dtype: np.dtype) -> WordTable:
        self._words = UnigramTable(self._source, dtype, self._lattice)
        return self._words

    def _settle(self, ids: NDArray[np.int64], closes: NDArray[np.int64]) -> None:
        words = self._words
        first = np.concatenate([[0], closes + 1])
        last = np.concatenate([closes, [len(ids)]])
        before = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(words.weights.take(ids), out=before[1:])
        limited = np.flatnonzero(words.limited.take(ids))
        origins = before[first]
        owners = np.searchsorted(first, limited, side="right") - 1
        starts = (before[limited] - origins[owners]) * WEIGHT_UNIT
        follow = (before[last] - origins) * WEIGHT_UNIT * self._over - words.deepest >= RESET - _SPARE
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
            begin, end = int(first[document]), int(last[document])
            bounds = np.searchsorted(limited, [begin, end])
            span = _Span(ids[begin:end], before[begin : end + 1], limited[slice(*bounds)] - begin)
            total = self._carried if document == 0 else None
            goes_on = document == len(closes)
            after = self._follow(span, total or 0.0, goes_on)
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
            strayed += abs(int(words.weights[variant] - words.weights[word_id])) * WEIGHT_UNIT
            if strayed > start * self._rounding:
                break
            variants.append(variant)
        return variants

    def _follow(self, span: _Span, total: float, goes_on: bool) -> float:
        """Choose the words of a document that depend on what stands before them, or mark them to be encoded whole.

        Args:
            span: the words of the document in this window; their ids are changed in place.
            total: running total before them.
            goes_on: whether the total behind them is wanted.

        Returns:
            The running total behind them, if it is wanted.
        """
        ids = span.ids
        if not self._known_search:
            ids[:] = POISON
        if POISON in ids:
            return 0.0
        words = self._words
        done = 0
        while done < len(ids):
            part, sure = self._bounded(span, done, total)
            stop = len(part)
            if stop == sure == len(ids) - done and not goes_on:
                ids[done:] = part
                break
            totals = words.totals(part, total, sure)
            restarts = np.flatnonzero(-totals[:-1] - words.depths.take(part[sure:]) >= RESET - _SPARE)
            stop = sure + int(restarts[0]) if len(restarts) else stop
            ids[done : done + stop] = part[:stop]
            total = float(totals[stop - sure])
            done += stop
            if done < len(ids):
                ids[done], total = words.at(int(ids[done]), total)
                done += 1
        return total

    def _bounded(self, span: _Span, done: int, total: float) -> tuple[NDArray[np.int64], int]:
        """Choose words by bounds on the running total, as far as the bounds decide.

        Args:
            span: the words of a document.
            done: how many of them have been chosen.
            total: running total behind those, a 32-bit float.

        Returns:
            The words that follow with their segmentations, which are settled if SentencePiece does not start again from
            zero before, and how many of them stand where it certainly does not.
        """
        words = self._words
        origin = span.before[done] + np.int64(round(total / WEIGHT_UNIT))
        sizes = np.array([(RESET - _SPARE + words.deepest) / self._over, RESET / self._under])
        bounds = origin + np.rint(sizes / WEIGHT_UNIT).astype(np.int64)
        sure, stop = done + np.searchsorted(span.before[done:-1], bounds)
        places = span.limited[slice(*np.searchsorted(span.limited, [done, stop]))]
        starts = (span.before[places] - origin) * WEIGHT_UNIT
        doubtful = self._doubtful(span.ids, places, starts)
        places, starts = places[doubtful], starts[doubtful]
        variants = self._variants(span.ids, places, starts)
        if len(variants) < len(places):
            stop = places[len(variants)]
        part = span.ids[done:stop].copy()
        part[places[: len(variants)] - done] = variants
        return part, int(min(sure, stop)) - done
