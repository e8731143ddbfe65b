"""When a byte-level BPE tokenizer's tokens of a text are those of its words.

The tokenizers library cuts a text by a regular expression, from left to right, and merges bytes inside each match only.
For the expressions listed here a text can be cut before a space that follows anything but white space:

- No alternative matches a character that is not white space and then a space, so a match ends there; all characters are
  matched by some alternative, so the next match begins there.
- Where a match begins and ends depends on the text from its beginning on, and before the cut only on characters up to
  it: runs of letters, digits or signs stop at a space as at the end of the text, and the one look-ahead, `\\s+(?!\\S)`,
  looks from white space, which no cut follows.

What counts as white space differs between versions of Unicode, so the cut is made only behind bytes that end no white
space in any of them. Text that spells an added token is encoded whole, since those are taken out first.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from more_megatron.data.wordencoder import CutRule
from more_megatron.data.wordtable import WordTokens

__all__ = ["ByteLevelPlan", "ByteLevelWords", "plan_byte_level"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_EXPRESSIONS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        _CONTRACTIONS + "|" + _LEAD + r"\p{L}+|\p{N}{1,3}" + _SIGNS + _TAIL,
        _CONTRACTIONS + "|" + _LEAD + r"\p{L}+|\p{N}" + _SIGNS + _TAIL,
        _LEAD + _UPPER + "*" + _LOWER + "+" + _CONTRACTIONS + "?|"
        + _LEAD + _UPPER + "+" + _LOWER + "*" + _CONTRACTIONS + "?|"
        + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL,
    }
)  # fmt: skip
# Last bytes of U+0085, U+00A0, U+1680, U+180E, U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F and U+3000.
_WHITE_ENDS = frozenset({0x85, 0xA0, 0x8E, *range(0x80, 0x8B), 0xA8, 0xA9, 0xAF, 0x9F})
_CLOSING = bytes(byte for byte in range(0x21, 0xFE) if byte != 0x7F and byte not in _WHITE_ENDS)


@dataclass(frozen=True)
class ByteLevelPlan:
    """How texts are cut for a tokenizer.

    Args:
        rule: the rule by which to cut.
        added: texts of the added tokens.
        prefix: special tokens before a text.
        suffix: special tokens behind it.
    """

    rule: CutRule
    added: Sequence[str]
    prefix: Sequence[int]
    suffix: Sequence[int]


def plan_byte_level(tokenizer: Any) -> ByteLevelPlan | str:
    """Decide whether texts may be cut into words for this tokenizer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Returns:
        How to cut, or the reason why texts must be encoded whole.
    """
    settings = json.loads(tokenizer.to_str())
    model, normalizer = settings["model"], settings["normalizer"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return "its model is not plain BPE"
    if normalizer is not None and normalizer.get("type") != "NFC":
        return f"its normaliser is {normalizer.get('type')}"
    if not _is_known_pretokenizer(settings["pre_tokenizer"]):
        return "its pre-tokenizer is not one of the known byte-level ones"
    for token in settings["added_tokens"]:
        spaced = token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"])
        if spaced or not token["content"] or (normalizer is not None and token["normalized"]):
            return f"its added token {token['content']!r} takes in white space or is normalised"
    around = _specials(tokenizer)
    if around is None:
        return "its post-processor changes the tokens"
    return ByteLevelPlan(
        CutRule(closing=_CLOSING, head=True), [token["content"] for token in settings["added_tokens"]], *around
    )


def _is_known_pretokenizer(settings: dict[str, Any] | None) -> bool:
    if settings is None:
        return False
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not all(_is_known_split(split) for split in splits):
        return False
    # Without its own expression the last step needs one before it.
    return bool(last.get("use_regex", True)) or any(split["type"] == "Split" for split in splits)


def _is_known_split(split: dict[str, Any]) -> bool:
    if split["type"] == "Digits":
        return True
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return plain and split["pattern"].get("Regex") in _EXPRESSIONS


def _specials(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Special tokens before and behind every text."""
    found = []
    for text in ("", "a", "b c"):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        full = tokenizer.encode(text).ids
        places = [place for place in range(len(full) - len(bare) + 1) if full[place : place + len(bare)] == bare]
        found.append([(full[:place], full[place + len(bare) :]) for place in places])
    for around in found[1]:
        if around in found[0] and around in found[2]:
            return around
    return None


class ByteLevelWords:
    """Encodes single words.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        plan: the plan for it.
    """

    def __init__(self, tokenizer: Any, plan: ByteLevelPlan) -> None:
        self._tokenizer = tokenizer
        self._prefix = list(plan.prefix)
        longest_first = sorted(plan.added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def words(self, words: list[bytes]) -> WordTokens:
        """Tokens of words after a space."""
        return WordTokens.of(self._encode([" " + word.decode() for word in words]))

    def heads(self, words: list[bytes]) -> WordTokens:
        """Tokens of words at the start of a text, after the special tokens that begin it."""
        found = self._encode([word.decode() for word in words])
        return WordTokens.of([None if tokens is None else [*self._prefix, *tokens] for tokens in found])

    def whole(self, text: str) -> Sequence[int]:
        """Tokens of a whole document."""
        ids: Sequence[int] = self._tokenizer.encode(text).ids
        return ids

    def _encode(self, texts: list[str]) -> list[list[int] | None]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            None if self._has_added(text) else encoding.ids for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _has_added(self, text: str) -> bool:
        return self._added is not None and self._added.search(text) is not None
