"""Words of a unigram model, each in the segmentation that its place in the document calls for."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.unigram import RESET, UnigramLattice, float32
from more_megatron.data.wordencoder import CutRule, WordEncoder
from more_megatron.data.wordtable import POISON, WordTable, WordTokens

__all__ = ["UnigramEncoder", "UnigramTable", "search_is_known"]

_KNOWN_VERSIONS = ("0.2.3",)
_STEP = 1 << 11


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
        self._facts: NDArray[np.float64] = np.zeros((3, 1024))
        self._scores = np.zeros(1024, dtype=np.float32)
        self._spans = np.zeros((2, 1024), dtype=np.int64)
        self._scores_used = 0
        self._texts: dict[int, str] = {}
        self._variants: dict[tuple[int, int], int] = {}
        super().__init__(encode, dtype)

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self._scores_used = 0
        self._texts.clear()
        self._variants.clear()
        self._facts[:, POISON] = (0.0, np.inf, 0.0)
        self._spans[:, POISON] = 0

    @property
    def weights(self) -> NDArray[np.float64]:
        """Sum of the scores of each word with its sign changed, float64 [ids]."""
        return self._facts[0]

    @property
    def limits(self) -> NDArray[np.float64]:
        """Size of the running total up to which each word's tokens hold, float64 [ids]."""
        return self._facts[1]

    @property
    def depths(self) -> NDArray[np.float64]:
        """How far the running total falls inside each word, at most 0, float64 [ids]."""
        return self._facts[2]

    def add(self, tokens: Sequence[int]) -> int:
        """Store tokens that no word of a text spells; they weigh nothing."""
        word_id = super().add(tokens)
        if word_id >= self._facts.shape[1]:
            grown = max(2 * self._facts.shape[1], word_id + 1) - self._facts.shape[1]
            self._facts = np.concatenate([self._facts, np.zeros((3, grown))], axis=1)
            self._spans = np.concatenate([self._spans, np.zeros((2, grown), dtype=np.int64)], axis=1)
        self._facts[:, word_id] = (0.0, np.inf, 0.0)
        self._spans[:, word_id] = 0
        return word_id

    def _added(self, word: bytes, word_id: int) -> None:
        if word_id == POISON:
            return
        text = self._normalize(word)
        found = self.lattice.segment(text)
        self._keep(word_id, found.scores, found.limit, found.deepest)
        self._texts[word_id] = text

    def _keep(self, word_id: int, scores: Sequence[float], limit: float, deepest: float) -> None:
        first, last = self._scores_used, self._scores_used + len(scores)
        if last > len(self._scores):
            self._scores = np.concatenate([self._scores, np.zeros(max(last, len(self._scores)), dtype=np.float32)])
        self._scores[first:last] = scores
        self._scores_used = last
        self._facts[:, word_id] = (-sum(scores), limit, deepest)
        self._spans[:, word_id] = (first, last - first)

    def variant(self, word_id: int, exponent: int) -> int | None:
        """Id of a word in its segmentation for totals between two powers of two; None if they do not decide it."""
        key = (word_id, exponent)
        if key not in self._variants:
            found = self.lattice.segment_in_range(self._texts[word_id], exponent)
            if found is None:
                return None
            self._variants[key] = self.add(found.tokens)
            self._keep(self._variants[key], found.scores, np.inf, found.deepest)
        return self._variants[key]

    def at(self, word_id: int, total: float) -> tuple[int, float]:
        """Id of a word in its segmentation at a running total, and the total behind it."""
        tokens, after = self.lattice.segment_at(self._texts[word_id], total)
        return self.add(tokens), after

    def totals(self, ids: NDArray[np.int64], total: float) -> NDArray[np.float32]:
        """Running total before each word and behind the last, as 32-bit additions make it, float32 [words + 1]."""
        counts = self._spans[1][ids]
        ends = np.cumsum(counts)
        places = np.repeat(self._spans[0][ids] - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
        running: NDArray[np.float32] = np.add.accumulate(
            np.concatenate([np.array([total], np.float32), self._scores[places]])
        )
        before: NDArray[np.float32] = running[np.concatenate([[0], ends])]
        return before


class UnigramEncoder(WordEncoder):
    """Encodes documents by words with a unigram model, exactly as SentencePiece encodes them whole.

    Most words of most documents have one segmentation whatever stands before them. The others are few; they are looked
    up for the range in which the running total lies. Documents that are long enough to make SentencePiece start again
    from zero are followed addition by addition.

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
        # Twice the rounding: once for the additions, once for words whose segmentation is not the best one.
        self._over = 1.0 + 2.0 * rounding
        self._under = 1.0 - 2.0 * rounding
        self._known_search = known_search
        # Whether the last document of the window before goes on in this one.
        self._unfinished = False
        super().__init__(rule, encode_words, encode_words, encode_whole, dtype, eod)

    def _make_table(self, encode_words: Callable[[list[bytes]], list[WordTokens]], dtype: np.dtype) -> WordTable:
        self._words = UnigramTable(encode_words, dtype, self._lattice, self._normalize)
        return self._words

    def _settle(self, ids: NDArray[np.int64], closes: NDArray[np.int64]) -> None:
        first = np.concatenate([[0], closes + 1])
        last = np.concatenate([closes, [len(ids)]])
        self._refuse_unfinished(ids, first, last)
        running = np.concatenate([[0.0], np.cumsum(self._words.weights[ids])])
        starts = running[:-1] - np.repeat(running[first], np.minimum(last + 1, len(ids)) - first)
        doubtful = np.searchsorted(closes, np.flatnonzero(starts * self._over > self._words.limits[ids]))
        long = np.flatnonzero((running[last] - running[first]) * self._over > RESET / 2)
        for document in np.unique(np.concatenate([doubtful, long])).tolist():
            span = slice(first[document], last[document])
            if not self._settle_document(ids[span], starts[span]):
                ids[span] = POISON

    def _refuse_unfinished(self, ids: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Documents larger than a window are encoded whole: their totals are not kept from window to window."""
        if self._unfinished:
            ids[first[0] : last[0]] = POISON
        self._unfinished = bool(first[-1] < len(ids))
        if self._unfinished:
            ids[first[-1] :] = POISON

    def _settle_document(self, ids: NDArray[np.int64], starts: NDArray[np.float64]) -> bool:
        """Choose each word's segmentation in one document; False if it must be encoded whole.

        Args:
            ids: the document's words, changed in place.
            starts: size of the running total before each word in exact arithmetic.
        """
        words = self._words
        if not self._known_search:
            return False
        end = (starts[-1] + words.weights[ids[-1]]) * self._over
        if end - words.depths[ids].min() >= RESET - 1.0:
            return self._follow(ids)
        # At the very beginning the total is 0 and a word's own tokens are those of the text.
        doubtful = np.flatnonzero((starts * self._over > words.limits[ids]) & (starts > 0.0))
        exponents = np.frexp(starts[doubtful] * self._under)[1]
        strayed = 0.0
        for place, start, exponent in zip(
            doubtful.tolist(), starts[doubtful].tolist(), exponents.tolist(), strict=True
        ):
            variant = words.variant(int(ids[place]), exponent)
            if variant is None:
                return False
            # Another segmentation scores a little less, which the bounds on later totals allow for.
            strayed += abs(words.weights[variant] - words.weights[ids[place]])
            highest = start * self._over - words.depths[variant]
            if highest >= 2.0**exponent - 1.0 or strayed > start * (self._over - 1.0) / 2:
                return self._follow(ids)
            ids[place] = variant
        return True

    def _follow(self, ids: NDArray[np.int64]) -> bool:
        """Follow the running total through a document, addition by addition."""
        words = self._words
        total = 0.0
        done = 0
        while done < len(ids):
            part = ids[done : done + _STEP]
            totals = words.totals(part, total)
            starts = -totals[:-1].astype(np.float64)
            special = (np.abs(starts) > words.limits[part]) | (starts - words.depths[part] >= RESET - 1.0)
            stop = int(np.argmax(special)) if special.any() else len(part)
            total = float(totals[stop])
            done += stop
            if stop < len(part):
                ids[done], total = self._at(int(ids[done]), total)
                done += 1
        return True

    def _at(self, word_id: int, total: float) -> tuple[int, float]:
        """One word at a running total: from its variants if they cover it, otherwise searched anew."""
        exponent = int(np.frexp(-total)[1])
        variant = self._words.variant(word_id, exponent)
        if variant is not None and total < 0:
            after = float32(self._words.totals(np.array([variant], dtype=np.int64), total)[-1])
            inside = -(total + self._words.depths[variant])
            if inside < min(2.0**exponent, RESET) - 1.0:
                return variant, after
        return self._words.at(word_id, total)
