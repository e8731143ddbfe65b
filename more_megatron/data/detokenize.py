"""Undoing WikiText's tokenised spelling: `well @-@ known , "` back to `well-known, "`."""

import re
from enum import StrEnum


class Detokenize(StrEnum):
    """How far to go back to ordinary spelling."""

    NONE = "none"
    """The text as it is."""
    JOINERS = "joiners"
    """Only ` @-@ `, ` @,@ ` and ` @.@ `, which stand for a character inside a word or a number."""
    FULL = "full"
    """Joiners, then the spaces that tokenisation put around punctuation, quotes and brackets."""


_JOINER = re.compile(r" @([-,.])@ ")
_BEFORE_CLOSING = re.compile(r" ([.,;:!?%)\]}]|'(?:s|t|m|d|re|ve|ll)\b|n't\b)")
_AFTER_OPENING = re.compile(r"([(\[{$£€]) ")
_QUOTED = re.compile(r'" ([^"\n]*?) "')
_DASHES = re.compile(r" ([\u2013/]) (?=\d)")


def detokenize(text: str, mode: Detokenize) -> str:
    """Bring WikiText back to ordinary spelling; unknown words (`<unk>`) and headings stay."""
    if mode is Detokenize.NONE:
        return text
    text = _JOINER.sub(r"\1", text)
    if mode is Detokenize.JOINERS:
        return text
    text = _QUOTED.sub(r'"\1"', text)
    text = _BEFORE_CLOSING.sub(r"\1", text)
    text = _AFTER_OPENING.sub(r"\1", text)
    return _DASHES.sub(r"\1", text)
