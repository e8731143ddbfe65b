"""Documents to tokens, a window of text at a time, through a table of words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.encoding import Encoded
from more_megatron.data.wordtable import LONGEST_WORD, POISON, EncodeWords, WordTable, cut_out, splice

__all__ = ["CutRule", "Window", "WordEncoder"]

WINDOW_BYTES = 1 << 20
"""Text looked up at a time: much for each call of numpy, little enough for the processor's cache."""

_FIRST_WINDOW_BYTES = 1 << 14
"""Text looked up at first: most of its words are new, and those that it repeats would be new each time."""

_EAGERNESS = 1 << 16
"""New words that are learnt although encoding their documents whole would be quicker: a table that begins is empty."""

_INVESTMENT = 1 / 256
"""As many such words for each word of text later, so that texts of another kind are learnt too."""

_REST = 7
"""Calls that encode all documents whole after one in which that was better for most of the text."""

_MOSTLY_WHOLE = 0.8
_LEAST_JUDGED_BYTES = 1 << 16

# Neither byte occurs in UTF-8.
_HEAD = 0xFE
_END = 0xFF
_SPACE = 0x20
_NEWLINE = 0x0A
_NOWHERE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class CutRule:
    """Where a text may be cut so that the parts can be encoded alone.

    A word begins at a space that follows a byte of `closing`, and is named by what stands after that space.

    Args:
        closing: the bytes after which a space begins a word; None for all but the space itself.
        blanks: ASCII bytes that the model reads as a space.
        newlines: whether a line break begins a word too, of which it is then the first byte.
        head: whether the first word of a text is encoded differently from the same word later.
    """

    closing: bytes | None = None
    blanks: bytes = b""
    newlines: bool = False
    head: bool = False


@dataclass
class Window:
    """The words of a piece of text that may hold several documents, and their tokens.

    Args:
        ids: word ids, int64 [words].
        closes: places in `ids` where documents end; the last one may go on in the next window.
        tokens: tokens of all words, one after the other.
        bounds: tokens before each word and behind the last, int64 [words + 1].
        whole: documents that must be encoded whole, by their place in the window.
    """

    ids: NDArray[np.int64]
    closes: NDArray[np.int64]
    tokens: NDArray[np.integer]
    bounds: NDArray[np.int64]
    whole: set[int]


class WordEncoder:
    """Encodes documents word by word, exactly as the tokenizer encodes them whole.

    Args:
        rule: where texts may be cut.
        encode_words: tokens of words after a space.
        encode_heads: tokens of words at the start of a text; used if the rule says that they differ.
        encode_whole: tokens of a whole document.
        dtype: dtype of the token ids.
        eod: token that ends each document, or None.
        suffix: tokens that the tokenizer puts behind every text; those before it belong to the first word.
        keeps_empty: whether a text without characters has tokens too.
        learn_share: share of new words in a document above which encoding it whole is quicker than learning them.
    """

    def __init__(
        self,
        rule: CutRule,
        encode_words: EncodeWords,
        encode_heads: EncodeWords,
        encode_whole: Callable[[str], Sequence[int] | NDArray[np.integer]],
        dtype: np.dtype,
        eod: int | None,
        suffix: Sequence[int] = (),
        keeps_empty: bool = False,
        learn_share: float = 0.25,
    ) -> None:
        self._rule = rule
        self._encode_heads = encode_heads
        self._encode_whole = encode_whole
        self._dtype = dtype
        self._eod = [] if eod is None else [eod]
        self._closing_tokens = [*suffix, *self._eod]
        self._keeps_empty = keeps_empty
        self._opening = bytes([_HEAD if rule.head else _SPACE])
        self._inner = bytes([_SPACE, _HEAD]) + rule.blanks
        self._closing = None
        if rule.closing is not None:
            self._closing = np.zeros(256, dtype=bool)
            self._closing[list(rule.closing)] = True
        self._table = self._make_table(encode_words, dtype)
        self._heads: dict[bytes, int] = {}
        self._begin_table()
        self._window_bytes = min(_FIRST_WINDOW_BYTES, WINDOW_BYTES)
        self._learn_share = learn_share
        self._rest = 0

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Encode documents.

        Args:
            documents: the documents as UTF-8.

        Returns:
            Their tokens, in order.
        """
        rests = self._rest > 0
        whole = {
            index
            for index, document in enumerate(documents)
            if rests or b"\0" in document or (self._keeps_empty and not document)
        }
        text = b"".join(
            [part for index, document in enumerate(documents) for part in self._framed(document, index in whole)]
        )
        tokens, lengths = self._encode_text(text, whole)
        if rests:
            self._rest -= 1
        elif self._is_mostly_whole(documents, whole):
            self._rest = _REST
        return self._finish(documents, tokens, lengths, whole)

    def _is_mostly_whole(self, documents: Sequence[bytes], whole: set[int]) -> bool:
        size = sum(map(len, documents))
        return size >= _LEAST_JUDGED_BYTES and sum(len(documents[index]) for index in whole) > _MOSTLY_WHOLE * size

    def _framed(self, document: bytes, whole: bool) -> tuple[bytes, ...]:
        # A document without text has no word at all, not one empty word.
        if whole or not document:
            return (b"\xff",)
        return (self._opening, document, b"\xff")

    def _encode_text(self, text: bytes, whole: set[int]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        parts: list[NDArray[np.integer]] = []
        ends: list[NDArray[np.int64]] = []
        done = documents = start = 0
        while start < len(text):
            stop = self._window_end(text, start)
            window = self._encode_window(text[start:stop])
            whole.update(documents + index for index in window.whole)
            parts.append(window.tokens)
            ends.append(window.bounds[window.closes + 1] + done)
            done += len(window.tokens)
            documents += len(window.closes)
            start = stop
            self._window_bytes = min(2 * self._window_bytes, WINDOW_BYTES)
        if not parts:
            return np.empty(0, self._dtype), np.empty(0, np.int64)
        all_ends: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), *ends])
        return np.concatenate(parts), all_ends[1:] - all_ends[:-1]

    def _make_table(self, encode_words: EncodeWords, dtype: np.dtype) -> WordTable:
        return WordTable(encode_words, dtype)

    def _begin_table(self) -> None:
        self._table.clear()
        self._heads.clear()
        self._end_id = self._table.add(self._closing_tokens)
        self._eagerness = float(_EAGERNESS)

    def _settle(self, window: Window) -> None:
        """Change tokens that depend on where in its document a word stands; for models of which that is true."""

    def _window_end(self, text: bytes, start: int) -> int:
        """A document's end or a cut after the wanted size, so that no word lies in two windows."""
        wanted = start + self._window_bytes
        if wanted >= len(text):
            return len(text)
        end = text.find(b"\xff", wanted) + 1
        if end <= wanted + self._window_bytes:
            return end
        space = text.find(b" ", wanted, end)
        while space >= 0 and not self._cuts(text, space):
            space = text.find(b" ", space + 1, end)
        return space if space >= 0 else end

    def _cuts(self, text: bytes, space: int) -> bool:
        before = text[space - 1]
        return before not in self._inner if self._closing is None else bool(self._closing[before])

    def _encode_window(self, text: bytes) -> Window:
        if self._table.full:
            self._begin_table()
        data = np.frombuffer(text, dtype=np.uint8)
        closing = np.flatnonzero(data == _END)
        heads = np.flatnonzero(data == _HEAD) if self._rule.head else _NOWHERE
        bounds = self._find_cuts(data, np.concatenate([closing, heads]))
        cuts, ends = bounds[:-1], bounds[1:]
        starts = cuts + 1
        if self._rule.newlines:
            starts -= data.take(cuts) == _NEWLINE
        closes = np.searchsorted(cuts, closing)
        ids = self._table.look_up(text, starts, ends, lambda new: self._choose(new, closes, len(cuts)))
        ids[closes] = self._end_id
        if self._rule.head:
            self._look_up_heads(text, ids, np.searchsorted(cuts, heads), starts, ends)
        poisoned = np.searchsorted(closes, np.flatnonzero(ids == POISON))
        window = Window(ids, closes, *self._table.gather(ids), whole=set(poisoned.tolist()))
        self._settle(window)
        return window

    def _choose(self, new: NDArray[np.int64], closes: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        """Which new words to learn: all or none of a document's, which is encoded whole without them.

        Args:
            new: places of the new words in a window, int64 [new].
            closes: places where documents end.
            count: words of the window.
        """
        owners = np.searchsorted(closes, new)
        sizes = np.diff(closes, prepend=-1, append=count)
        too_many = np.maximum(np.bincount(owners, minlength=len(sizes)) - self._learn_share * sizes, 0.0)
        learnt = (too_many == 0.0) | (np.cumsum(too_many) <= self._eagerness)
        self._eagerness = min(self._eagerness - too_many[learnt].sum() + _INVESTMENT * count, _EAGERNESS)
        return learnt[owners]

    def _find_cuts(self, data: NDArray[np.uint8], marks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where words begin or documents end, and the end of the text, given where documents begin and end."""
        every = np.ones(len(data) + 1, dtype=bool)
        cut = every[:-1]
        np.equal(data, _SPACE, out=cut)
        for blank in self._rule.blanks:
            cut |= data == blank
        if self._closing is not None:
            opens = self._closing[data[:-1]]
        elif self._rule.head:
            opens = ~cut[:-1] & (data[:-1] != _HEAD)
        else:
            opens = ~cut[:-1]
        cut[1:] &= opens
        cut[marks] = True
        if self._rule.newlines:
            cut |= data == _NEWLINE
        return np.flatnonzero(every)

    def _look_up_heads(
        self,
        text: bytes,
        ids: NDArray[np.int64],
        heads: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        ids[heads] = POISON
        heads = heads[ends[heads] - starts[heads] <= LONGEST_WORD]
        words = cut_out(text, starts, ends, heads)
        new = list(dict.fromkeys(word for word in words if word not in self._heads))
        if new:
            self._heads.update(zip(new, self._table.store(self._encode_heads(new), len(new)).tolist(), strict=True))
        ids[heads] = [self._heads[word] for word in words]

    def _finish(
        self, documents: Sequence[bytes], tokens: NDArray[np.integer], lengths: NDArray[np.int64], whole: set[int]
    ) -> Encoded:
        """Put in the documents that were encoded whole, and take the end token from empty ones."""
        spliced = dict.fromkeys(np.flatnonzero(lengths == len(self._closing_tokens)).tolist(), np.empty(0, self._dtype))
        for index in whole:
            ids = np.asarray(self._encode_whole(documents[index].decode()), dtype=self._dtype)
            spliced[index] = np.append(ids, np.array(self._eod, self._dtype)) if len(ids) else ids
        if spliced:
            tokens, bounds = splice(tokens, np.concatenate([[0], np.cumsum(lengths)]), spliced)
            lengths = np.diff(bounds)
        return Encoded(tokens, lengths.astype(np.int32))
