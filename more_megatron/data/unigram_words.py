"""Words of a unigram model, each in the segmentation that its place in the document calls for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.sentencepiece_words import SentencePieceWords
from more_megatron.data.unigram import RESET, WEIGHT_UNIT, Segmentation, UnigramLattice
from more_megatron.data.unigram_batch import Segmentations, WordBatches
from more_megatron.data.wordencoder import CutRule, Window, WordEncoder
from more_megatron.data.wordtable import POISON, EncodeWords, WordTable, splice

__all__ = ["UnigramEncoder", "UnigramTable", "search_is_known"]

_KNOWN_VERSIONS = ("0.2.3",)
# As many words as take the same time together as one by one.
_BATCH = 24
# SentencePiece is quick with unigram models.
_LEARN_SHARE = 0.03
# More than what rounding inside a word can add up to.
_SPARE = 1.0


def search_is_known(version: str) -> bool:
    """Whether SentencePiece of this version searches as `UnigramLattice` does, its start from zero included."""
    return version in _KNOWN_VERSIONS


@dataclass(frozen=True)
class Variant:
    """What becomes of a word at totals between two powers of two.

    Args:
        tokens: its tokens, or None if they are its own.
        scores: score of each piece, float32 [pieces].
        stray: how much the sum of the scores differs from that of the word itself.
    """

    tokens: NDArray[np.integer] | None
    scores: NDArray[np.float32]
    stray: float


class UnigramTable(WordTable):
    """Words with what `UnigramLattice` says of them.

    Args:
        source: encodes and normalises words.
        dtype: see `WordTable`.
        lattice: the model's segmentations.

    Attributes:
        weights: sum of the scores of each word with its sign changed, in units of `WEIGHT_UNIT`, int64 [ids]; odd for
            special words, of which the tokens do not hold at all running totals up to `RESET` or are not one for each
            piece.
        limits: size of the running total up to which each word's tokens hold, float64 [ids].
        depths: bound on how far the running total falls inside each word, at most 0, float64 [ids].
        deepest: the least of them.
        scores: score of each piece of words that have more pieces than tokens, by id.
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
        self.depths = np.zeros(1024)
        self.scores: dict[int, NDArray[np.float32]] = {}
        self._token_scores = lattice.token_scores
        self._texts: dict[int, str] = {}
        self._variants: dict[tuple[int, int], Variant | None] = {}
        super().__init__(source.words, dtype)

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self.deepest = 0.0
        self.scores.clear()
        self._texts.clear()
        self._variants.clear()

    @property
    def full(self) -> bool:
        """Whether the table should be emptied before the next look-up."""
        return super().full or len(self._variants) >= self._capacity

    def _reserve(self, rows: int) -> None:
        super()._reserve(rows)
        size = len(self._counts)
        if size > len(self.weights):
            self.weights, self.limits, self.depths = (
                np.resize(facts, size) for facts in (self.weights, self.limits, self.depths)
            )

    def add(self, tokens: Sequence[int]) -> int:
        """Store a word that no text can spell; it adds nothing to the running total."""
        word_id = super().add(tokens)
        self.weights[word_id], self.limits[word_id], self.depths[word_id] = 0, np.inf, 0.0
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
        self._keep(ids[kept], texts, found)
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

    def _keep(self, ids: NDArray[np.int64], texts: list[str], found: Segmentations) -> None:
        if not len(ids):
            return
        self._texts.update(zip(ids.tolist(), texts, strict=True))
        self.limits[ids] = found.limits
        self.depths[ids] = found.depths
        self.deepest = min(self.deepest, float(found.depths.min()))
        merged = found.merging & self.lattice.merges_unknown
        self.weights[ids] = 2 * np.rint(found.weights / (2 * WEIGHT_UNIT)) + ((found.limits < RESET) | merged)
        ends = np.cumsum(found.counts)
        for index in np.flatnonzero(merged).tolist():
            self.scores[int(ids[index])] = found.scores[ends[index] - found.counts[index] : ends[index]]

    def between(self, word_id: int, least: float, most: float) -> Variant | None:
        """What becomes of a word at all running totals of two sizes and between; None if they do not decide it.

        Two powers of two must enclose the sizes, and that at each place of the word, which must not reach `RESET`.
        """
        exponent = math.frexp(least)[1]
        enclosed = min(2.0**exponent, RESET) - _SPARE
        if most - self.depths[word_id] >= enclosed:
            return None
        variant = self._variant(word_id, exponent)
        # A segmentation that is new to the table may fall deeper.
        return variant if most - self.depths[word_id] < enclosed else None

    def _variant(self, word_id: int, exponent: int) -> Variant | None:
        key = (word_id, exponent)
        if key not in self._variants:
            found = self.lattice.segment_in_range(self._texts[word_id], exponent)
            self._variants[key] = None if found is None else self._compared(word_id, found)
        return self._variants[key]

    def _compared(self, word_id: int, found: Segmentation) -> Variant:
        self.depths[word_id] = min(self.depths[word_id], found.deepest)
        self.deepest = min(self.deepest, found.deepest)
        return Variant(
            tokens=self._unless_own(word_id, found.tokens),
            scores=np.array(found.scores, dtype=np.float32),
            stray=abs(sum(found.scores) + int(self.weights[word_id]) * WEIGHT_UNIT),
        )

    def _unless_own(self, word_id: int, tokens: list[int]) -> NDArray[np.integer] | None:
        own = self.tokens_of(word_id)
        # The same tokens can come of other pieces where one of them stands for several characters.
        same = tokens == own.tolist() and word_id not in self.scores
        return None if same else np.array(tokens, dtype=own.dtype)

    def at(self, word_id: int, total: float) -> tuple[NDArray[np.integer] | None, float]:
        """Tokens of a word at a running total, None if they are its own, and the total behind it."""
        variant = self.between(word_id, -total, -total) if total < 0 else None
        if variant is not None:
            return variant.tokens, float(_accumulated(total, variant.scores)[-1])
        tokens, after = self.lattice.segment_at(self._texts[word_id], total)
        return self._unless_own(word_id, tokens), after

    def totals(
        self,
        tokens: NDArray[np.integer],
        bounds: NDArray[np.int64],
        total: float,
        others: Mapping[int, NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Running totals as 32-bit additions make them.

        Args:
            tokens: tokens of some words.
            bounds: tokens before each word and behind the last, int64 [words + 1].
            total: running total before them.
            others: scores of words of which their own tokens do not tell them, by place.

        Returns:
            The totals before each word and behind the last, float32 [words + 1].
        """
        scores = self._token_scores.take(tokens)
        if others:
            scores, bounds = splice(scores, bounds, others)
        return _accumulated(total, scores).take(bounds)


def _accumulated(total: float, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """A running total before and behind each of some scores, as 32-bit additions make it."""
    totals = np.empty(len(scores) + 1, dtype=np.float32)
    totals[0] = total
    totals[1:] = scores
    return np.add.accumulate(totals, out=totals)


@dataclass(frozen=True)
class _Span:
    """Words of one document that stand in one window.

    Args:
        ids: the words, int64 [words].
        tokens: the own tokens of the window's words.
        bounds: how many of those stand before each of them and behind the last, int64 [words + 1].
        before: sum of the weights of the window's words before each of them and behind the last, int64 [words + 1].
        special: places of words that need a closer look, int64 [places].
    """

    ids: NDArray[np.int64]
    tokens: NDArray[np.integer]
    bounds: NDArray[np.int64]
    before: NDArray[np.int64]
    special: NDArray[np.int64]

    @classmethod
    def of(cls, window: Window, before: NDArray[np.int64], special: NDArray[np.int64], begin: int, end: int) -> "_Span":
        """Cut from a window, and what is known of all its words, the words from one place to another."""
        return cls(
            ids=window.ids[begin:end],
            tokens=window.tokens,
            bounds=window.bounds[begin : end + 1],
            before=before[begin : end + 1],
            special=special[slice(*special.searchsorted([begin, end]))] - begin,
        )


@dataclass(frozen=True)
class _Reach:
    """How far bounds on the running total decide.

    Args:
        stop: the word after the last one that they decide, if SentencePiece does not start again from zero before.
        sure: the first word where it may do so, at most `stop`.
        special: the places of special words before `stop`, int64 [places].
        variants: what becomes of those of them that need more than a look at their limit, by their place.
    """

    stop: int
    sure: int
    special: NDArray[np.int64]
    variants: dict[int, Variant]


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

    def _settle(self, window: Window) -> None:
        words = self._words
        ids = window.ids
        first = np.concatenate([[0], window.closes + 1])
        last = np.concatenate([window.closes, [len(ids)]])
        weights = words.weights.take(ids)
        special = np.flatnonzero(_are_odd(weights))
        before = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(weights, out=before[1:])
        origins = before[first]
        owners = np.searchsorted(first, special, side="right") - 1
        starts = (before[special] - origins[owners]) * WEIGHT_UNIT
        follow = (before[last] - origins) * WEIGHT_UNIT * self._over - words.deepest >= RESET - _SPARE
        follow[0] |= self._carried is not None
        follow[-1] |= first[-1] < len(ids)
        changes: dict[int, NDArray[np.integer]] = {}
        doubtful = np.flatnonzero(self._doubtful(ids, special, starts) & ~follow[owners])
        for here in np.split(doubtful, np.flatnonzero(np.diff(owners[doubtful])) + 1):
            variants = self._variants(ids, special[here], starts[here])
            if len(variants) < len(here):
                follow[owners[here[0]]] = True
            else:
                changes |= _changes(variants)
        for document in np.flatnonzero(follow).tolist():
            total = (document == 0 and self._carried) or 0.0
            goes_on = document == len(window.closes)
            begin, end = int(first[document]), int(last[document])
            if not self._known_search:
                window.whole.add(document)
            if document not in window.whole:
                span = _Span.of(window, before, special, begin, end)
                found, total = self._follow(span, total, goes_on)
                changes.update((begin + place, tokens) for place, tokens in found.items())
            self._carried = total if goes_on else None
        if changes:
            window.tokens, window.bounds = splice(window.tokens, window.bounds, changes)

    def _doubtful(
        self, ids: NDArray[np.int64], places: NDArray[np.int64], starts: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Which of some words may need other tokens than their own at totals of some sizes in exact arithmetic."""
        # At the very beginning the total is 0 and a word's own tokens are those of the text.
        return (starts * self._over > self._words.limits.take(ids[places])) & (starts > 0.0)

    def _variants(
        self, ids: NDArray[np.int64], places: NDArray[np.int64], starts: NDArray[np.float64]
    ) -> dict[int, Variant]:
        """What becomes of doubtful words of a document, as many of them as bounds on the running total decide.

        The total before a word lies near the sum of the words before in exact arithmetic and their own segmentations.
        It is off by the rounding of its additions, which `rounding` bounds, and by what words chosen here score less,
        which is watched to stay below the same bound.

        Args:
            ids: words.
            places: the doubtful ones.
            starts: size of the running total before each of them in exact arithmetic.
        """
        variants: dict[int, Variant] = {}
        if not self._known_search:
            return variants
        strayed = 0.0
        for place, start in zip(places.tolist(), starts.tolist(), strict=True):
            variant = self._words.between(int(ids[place]), start * self._under, start * self._over)
            if variant is None:
                break
            strayed += variant.stray
            if strayed > start * self._rounding:
                break
            variants[place] = variant
        return variants

    def _follow(self, span: _Span, total: float, goes_on: bool) -> tuple[dict[int, NDArray[np.integer]], float]:
        """Choose the tokens of words that depend on what stands before them.

        Args:
            span: the words of a document in this window.
            total: running total before them.
            goes_on: whether the total behind them is wanted.

        Returns:
            Tokens of the words for which they are not their own, by place, and the total behind them if it is wanted.
        """
        words = self._words
        changes: dict[int, NDArray[np.integer]] = {}
        done = 0
        while done < len(span.ids):
            reach = self._reach(span, done, total)
            stop = reach.stop
            if stop < len(span.ids) or reach.sure < stop or goes_on:
                totals = self._totals(span, done, reach, total)
                falls = words.depths.take(span.ids[reach.sure : stop])
                restarts = np.flatnonzero(-totals[:-1] - falls >= RESET - _SPARE)
                if len(restarts):
                    stop = reach.sure + int(restarts[0])
                total = float(totals[stop - reach.sure])
            changes |= _changes({place: variant for place, variant in reach.variants.items() if place < stop})
            if stop < len(span.ids):
                stop, total = self._pass(span, stop, total, changes)
            done = stop
        return changes, total

    def _pass(
        self, span: _Span, place: int, total: float, changes: dict[int, NDArray[np.integer]]
    ) -> tuple[int, float]:
        """Go through words one by one, at least one, and on while SentencePiece may start again from zero.

        Args:
            span: the words of a document.
            place: the first of them.
            total: running total before it.
            changes: takes the tokens of the words for which they are not their own, by place.

        Returns:
            The word after the last one, and the running total before it.
        """
        words = self._words
        ids = span.ids
        while True:
            tokens, total = words.at(int(ids[place]), total)
            if tokens is not None:
                changes[place] = tokens
            place += 1
            if place == len(ids) or -total - words.depths[ids[place]] < RESET - _SPARE:
                return place, total

    def _reach(self, span: _Span, done: int, total: float) -> _Reach:
        """See how far bounds on the running total decide.

        Args:
            span: the words of a document.
            done: how many of them are settled.
            total: running total behind those, a 32-bit float.
        """
        words = self._words
        origin = span.before[done] + np.int64(round(total / WEIGHT_UNIT))
        sizes = ((RESET - _SPARE + words.deepest) / self._over, RESET / self._under)
        bounds = [int(origin) + round(size / WEIGHT_UNIT) for size in sizes]
        sure, stop = (done + span.before[done:-1].searchsorted(bounds)).tolist()
        special = span.special[slice(*span.special.searchsorted([done, stop]))]
        starts = (span.before[special] - origin) * WEIGHT_UNIT
        doubtful = self._doubtful(span.ids, special, starts)
        places = special[doubtful]
        variants = self._variants(span.ids, places, starts[doubtful])
        if len(variants) < len(places):
            stop = int(places[len(variants)])
            special = special[special < stop]
        return _Reach(stop, min(sure, stop), special, variants)

    def _totals(self, span: _Span, done: int, reach: _Reach, total: float) -> NDArray[np.float32]:
        """Running totals before each word that may be the last before a start from zero, and behind the last."""
        scores = self._words.scores
        others = {place: scores.get(int(span.ids[place])) for place in reach.special.tolist()} if scores else {}
        others |= {place: variant.scores for place, variant in reach.variants.items() if variant.tokens is not None}
        bounds = span.bounds[done : reach.stop + 1]
        totals = self._words.totals(
            tokens=span.tokens[bounds[0] : bounds[-1]],
            bounds=bounds - bounds[0],
            total=total,
            others={place - done: own for place, own in others.items() if own is not None},
        )
        return totals[reach.sure - done :]


def _are_odd(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    lowest_bytes = numbers.astype("<i8", copy=False).view(np.uint8)[:: numbers.itemsize]
    return (lowest_bytes & 1).view(bool)


def _changes(variants: Mapping[int, Variant]) -> dict[int, NDArray[np.integer]]:
    """Tokens of the words for which they are not their own, by their place."""
    return {place: variant.tokens for place, variant in variants.items() if variant.tokens is not None}
