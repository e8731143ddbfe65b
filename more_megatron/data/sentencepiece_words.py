"""When a SentencePiece model's tokens of a text are those of its words, and where its words lie.

A model encodes in two steps, and each must respect the words:

1. *Normalisation* scans the text once, replacing the longest match of a rule at each position, and turns spaces into
   U+2581. Rules whose left side holds no space behind its first byte never reach over a space, so what a word becomes
   depends on the word alone. Models that collapse spaces (`remove_extra_whitespaces`) do it relative to the previous
   word's end, which is the same for every word; models that keep them need the previous word to end in no space.
2. *Segmentation* joins characters into pieces of the vocabulary. If U+2581 stands only at the beginning of pieces, no
   piece reaches over a word's beginning, and BPE's merges in one word do not see those of another. Unused pieces are
   split by a table that is shared by the whole text, and a run of unknown characters becomes one token: both are
   refused here. Unigram's search sees the text before a word through rounding only, which `unigram.py` accounts for.

Whatever is not covered makes `plan_words` answer with the reason, and the model is then used on whole documents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.charsmap import RuleTable, read_rules
from more_megatron.data.unigram import WEIGHT_UNIT, WORST_ROUNDING, UnigramLattice
from more_megatron.data.wordencoder import CutRule
from more_megatron.data.wordtable import WordTokens

__all__ = [
    "SentencePieceModel",
    "SentencePieceWords",
    "encode_whole",
    "parse_model",
    "plan_words",
    "rounding_of_totals",
    "unigram_lattice",
]

_MARK = "\u2581"
_MARK_BYTES = _MARK.encode()
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Plain words that are encoded as one text.
_JOINED = 16
_WORST_RELATIVE_ROUNDING = 1 / 64
# The longest word must not reach from half the reset to the reset.
_LOWEST_SCORE = -80.0


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model file on which cutting a text rests.

    Args:
        pieces: text and type of each piece, in the order of ids.
        scores: score of each piece.
        model_type: 1 unigram, 2 BPE, 3 word, 4 char.
        byte_fallback: whether unknown characters become byte pieces.
        whitespace_suffix: whether U+2581 ends words instead of beginning them.
        dummy_prefix: whether a space is put before the text.
        collapse: whether runs of spaces become one, and spaces at both ends are dropped.
        escape: whether spaces become U+2581.
        rules: the normalisation rules.
    """

    pieces: Sequence[tuple[str, int]]
    scores: Sequence[float]
    model_type: int
    byte_fallback: bool
    whitespace_suffix: bool
    dummy_prefix: bool
    collapse: bool
    escape: bool
    rules: RuleTable

    @property
    def is_unigram(self) -> bool:
        """Whether the model is a unigram model."""
        return self.model_type == _UNIGRAM


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a serialized model.

    Raises:
        DataError: the model's normalisation table is damaged.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(data)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return SentencePieceModel(
        pieces=[(piece.piece, piece.type) for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        model_type=trainer.model_type,
        byte_fallback=trainer.byte_fallback,
        whitespace_suffix=trainer.treat_whitespace_as_suffix,
        dummy_prefix=normalizer.add_dummy_prefix,
        collapse=normalizer.remove_extra_whitespaces,
        escape=normalizer.escape_whitespaces,
        rules=read_rules(normalizer.precompiled_charsmap),
    )


def plan_words(model: SentencePieceModel) -> CutRule | str:
    """Decide whether texts may be cut into words for this model.

    Args:
        model: the model.

    Returns:
        The rule by which to cut, or the reason why texts must be encoded whole.
    """
    reason = _settings_reason(model) or _pieces_reason(model) or _rules_reason(model) or _unigram_reason(model)
    if reason:
        return reason
    user_defined = "".join(text for text, kind in model.pieces if kind == _USER_DEFINED)
    inner = model.rules.inner_bytes
    blanks = bytes(byte for byte in model.rules.blanks if chr(byte) not in user_defined and byte not in inner)
    if model.collapse:
        return CutRule(blanks=blanks)
    plain = not model.rules.replacements and model.byte_fallback and not model.is_unigram
    newlines = plain and model.dummy_prefix and not any("\n" in text for text, _ in model.pieces)
    return CutRule(blanks=blanks, newlines=newlines, head=not model.dummy_prefix)


def _settings_reason(model: SentencePieceModel) -> str | None:
    if model.model_type not in (_UNIGRAM, _BPE):
        return "its segmentation is neither BPE nor unigram"
    if not model.escape or model.whitespace_suffix:
        return "it does not mark a word's beginning"
    if model.collapse and not model.dummy_prefix:
        return "it marks all words but the first and drops the spaces by which that could be told"
    return None


def _pieces_reason(model: SentencePieceModel) -> str | None:
    kinds = dict(model.pieces)
    if kinds.get(_MARK) not in (_NORMAL, _USER_DEFINED) and not model.byte_fallback:
        return "U+2581 is unknown to it, and unknown characters of neighbouring words become one token"
    for text, kind in model.pieces:
        if kind == _UNUSED:
            return "it has unused pieces"
        if kind not in (_NORMAL, _USER_DEFINED):
            continue
        if _MARK in text.lstrip(_MARK) or " " in text:
            return f"its piece {text!r} reaches over a word's end"
    return None


def _rules_reason(model: SentencePieceModel) -> str | None:
    rules = model.rules
    if not rules.keeps_space or 0x20 in rules.inner_bytes:
        return "a rule of its normalisation reaches over a space"
    if b"  " in rules.replacements or _MARK_BYTES in rules.replacements:
        return "a rule of its normalisation makes more than one space"
    return None


def _unigram_reason(model: SentencePieceModel) -> str | None:
    if not model.is_unigram:
        return None
    if not model.dummy_prefix:
        return "it is a unigram model that does not mark the first word"
    if any(kind == _USER_DEFINED for _, kind in model.pieces):
        return "it is a unigram model with user-defined pieces"
    if dict(model.pieces).get(_MARK) != _NORMAL:
        return "U+2581 is unknown to it"
    if rounding_of_totals(model) > _WORST_RELATIVE_ROUNDING:
        return "its scores are too small for sums of 32-bit floats"
    if min(model.scores) < _LOWEST_SCORE or max(model.scores) > 0:
        return "its scores are no log-probabilities"
    return None


def rounding_of_totals(model: SentencePieceModel) -> float:
    """Bound on the relative error of a sum of a unigram model's scores, while it is smaller than the reset's size.

    Each addition is off by at most `WORST_ROUNDING`, and adds at least the smallest score. So does each word to
    a sum in whole numbers of `WEIGHT_UNIT`, which is off by at most two of them.
    """
    least = min(
        (-score for (_, kind), score in zip(model.pieces, model.scores, strict=True) if kind == _NORMAL), default=0
    )
    return (WORST_ROUNDING + 2 * WEIGHT_UNIT) / least if least > 0 else math.inf


def unigram_lattice(model: SentencePieceModel) -> UnigramLattice:
    """The segmentations of a unigram model."""
    pieces = {}
    unknown = -1
    byte_ids: list[int] = []
    for index, ((text, kind), score) in enumerate(zip(model.pieces, model.scores, strict=True)):
        if kind == _NORMAL:
            pieces[text] = (index, score)
        elif kind == _UNKNOWN:
            unknown = index
        elif kind == _BYTE:
            byte_ids.append(index)
    in_order = sorted(byte_ids, key=lambda index: int(model.pieces[index][0][1:-1], 16))
    return UnigramLattice(pieces, unknown, in_order if model.byte_fallback else None)


def encode_whole(processor: Any, text: str) -> Sequence[int] | NDArray[np.integer]:
    """Tokens of a text."""
    # Arrays are an order cheaper than lists of Python integers; older versions have only lists.
    encode = getattr(processor, "encode_as_numpy", processor.encode_as_ids)
    ids: Sequence[int] | NDArray[np.integer] = encode(text)
    return ids


class SentencePieceWords:
    """Encodes single words with a processor.

    Args:
        processor: a `sentencepiece.SentencePieceProcessor`.
        model: the same model's facts.
        rule: the rule from `plan_words`.
    """

    def __init__(self, processor: Any, model: SentencePieceModel, rule: CutRule) -> None:
        self._processor = processor
        self._collapse = model.collapse
        self._normalises = bool(model.rules.replacements)
        self._dummy_prefix = model.dummy_prefix
        self._rule = rule
        self._plain = model.rules.plain
        # BPE alone: sums of a unigram model's scores depend on the words before.
        self._joins = not model.is_unigram
        self._begins = np.array([text.startswith(_MARK) for text, _ in model.pieces])
        self._spaces = " " + rule.blanks.decode()

    def heads(self, words: list[bytes]) -> WordTokens:
        """Tokens of words at the start of a text."""
        return WordTokens.of(self._encode_safe(words, [word.decode() for word in words]))

    def words(self, words: list[bytes]) -> WordTokens:
        """Tokens of words after a space, or of words that begin with a line break."""
        prefix = "" if self._dummy_prefix else " "
        plain = self.are_plain(words) & self._joins
        joined, others = self._encode_joined(words, np.flatnonzero(plain).tolist(), prefix)
        others += np.flatnonzero(~plain).tolist()
        apart = WordTokens.of(
            self._encode_safe([words[index] for index in others], [prefix + words[index].decode() for index in others])
        )
        return WordTokens(
            places=np.concatenate([joined.places, np.array(others, dtype=np.int64)[apart.places]]),
            counts=np.concatenate([joined.counts, apart.counts]),
            tokens=np.concatenate([joined.tokens, apart.tokens]),
        )

    def _encode_joined(self, words: list[bytes], places: list[int], prefix: str) -> tuple[WordTokens, list[int]]:
        """Encode plain words several at a time, which takes less than half the time.

        Args:
            words: words.
            places: the plain ones.
            prefix: what stands before the first word of a text.

        Returns:
            Their tokens, and the places of words whose tokens do not show where they begin.
        """
        # Each word has at most one piece with U+2581, its first one; with fewer of them the words are encoded apart.
        groups = [places[start : start + _JOINED] for start in range(0, len(places), _JOINED)]
        texts = [prefix + b" ".join([words[index] for index in group]).decode() for group in groups]
        found: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        tokens = np.array(list(chain.from_iterable(found)), dtype=np.int64)
        owners = np.repeat(np.arange(len(groups)), [len(ids) for ids in found])
        begun = np.bincount(owners[self._begins[tokens]], minlength=len(groups))
        clear = begun == np.array([len(group) for group in groups], dtype=np.int64)
        tokens = tokens[clear[owners]]
        starts = np.flatnonzero(self._begins[tokens])
        joined = WordTokens(
            places=np.array(list(chain.from_iterable(compress(groups, clear))), dtype=np.int64),
            counts=np.diff(starts, append=len(tokens)),
            tokens=tokens,
        )
        return joined, list(chain.from_iterable(compress(groups, ~clear)))

    def are_plain(self, words: list[bytes]) -> NDArray[np.bool_]:
        """Which words have characters of which no rule of normalisation is about any."""
        return np.array([len(word) > 0 and not word.translate(None, self._plain) for word in words], dtype=bool)

    def normal(self, words: list[bytes], plain: Sequence[bool]) -> list[str]:
        """Words' normalised texts with their U+2581, given which words are plain."""
        return [
            _MARK + word.decode() if is_plain else self._normal(word)
            for word, is_plain in zip(words, plain, strict=True)
        ]

    def whole(self, text: str) -> Sequence[int] | NDArray[np.integer]:
        """Tokens of a whole document."""
        return encode_whole(self._processor, text)

    def _normal(self, word: bytes) -> str:
        if not word:
            return "" if self._collapse else _MARK
        text: str = self._processor.normalize(word.decode())
        return text

    def _encode_safe(self, words: list[bytes], texts: list[str]) -> list[Sequence[int] | None]:
        tokens: list[Sequence[int] | None] = list(self._processor.encode(texts, out_type=int, num_threads=1))
        for index, (word, text) in enumerate(zip(words, texts, strict=True)):
            if _MARK_BYTES in word or not self._stands_alone(text):
                tokens[index] = None
            elif not word:
                tokens[index] = self._lone_mark()
            elif self._rule.newlines and word.startswith(b"\n"):
                tokens[index] = self._without_mark(tokens[index])
        return tokens

    def _stands_alone(self, text: str) -> bool:
        """Whether the next word's spaces cannot join this word's end, where spaces are kept."""
        if self._collapse or not self._normalises or not text.strip(self._spaces):
            return True
        normal: str = self._processor.normalize(text)
        return not normal.endswith(_MARK)

    def _without_mark(self, tokens: Sequence[int] | None) -> Sequence[int] | None:
        """Tokens of a word behind a line break, without those of the space that the model put before the text."""
        mark = self._lone_mark()
        if tokens is None or mark is None or list(tokens[: len(mark)]) != list(mark):
            return None
        return tokens[len(mark) :]

    def _lone_mark(self) -> Sequence[int] | None:
        """Tokens of a space at the end of a text: what encoding a letter and a space adds to the letter."""
        if self._collapse:
            return []
        alone, followed = self._processor.encode(["a", "a "], out_type=int, num_threads=1)
        tokens: Sequence[int] = followed[len(alone) :]
        return tokens if followed[: len(alone)] == alone else None
