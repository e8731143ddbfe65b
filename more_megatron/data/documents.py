"""Where documents begin in a stream of text.

Every rule looks at a bounded neighbourhood of a position only, so documents are the same however a text is cut into
blocks. Positions are bytes, and a cut lies at the start of a line (or, in text without line breaks, at a space), so it
never splits a character.
"""

import re
from collections.abc import Iterator
from enum import StrEnum


class Layout(StrEnum):
    """How an input is divided into documents."""

    WIKITEXT = "wikitext"
    """An article for each level-one heading ` = Title = ` that stands between blank lines."""
    PLAIN = "plain"
    """Pieces of text without headings, cut at the first paragraph break after every `PLAIN_GRID_BYTES`."""
    JSONL = "jsonl"
    """One JSON object a line, its text under a key; or one row of a Parquet file."""


PLAIN_GRID_BYTES = 4096
"""Grid on which text without headings is cut: small enough that `--split 949,50,1` leaves documents for validation."""

_ASCII_SPACE = " \t\n\r\v\f"
_JSON_LINE = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{[ \t]*"')
_LINE_LIKE_HEADING = re.compile(rb"\n(?=[ ]?=[ ][^=\s])")
_HEADING_LINE = re.compile(rb"[ ]?=[ ][^=\s](?:[^\n]*[^\n=])?[ ]=[ \t\r]*\n[ \t\r]*(?:\n|\Z)")
_BLANK_BEFORE = re.compile(rb"(?:\A|\n)[ \t\r]*\n\Z")
_PARAGRAPH = re.compile(rb"\n[ \t\r]*\n(?=[ \t\r]*[^\s])")


def sniff_layout(sample: bytes) -> Layout:
    """Tell JSON lines, by how the first of them begins, and WikiText, by a level-one heading, from other text."""
    if _JSON_LINE.match(sample):
        return Layout.JSONL
    headed = _HEADING_LINE.match(sample) or _find_heading(sample, 1) is not None
    return Layout.WIKITEXT if headed else Layout.PLAIN


def find_start(data: bytes, position: int, layout: Layout, origin: int, final: bool) -> int | None:
    """Return the first place at or after a position above 0 where a document begins; None: that takes more text.

    `data` is a part of the text, from byte `origin` on, where a document begins; if it is `final`, one ends with it.
    """
    if layout is Layout.JSONL:
        found = data.find(b"\n", position - 1) + 1 or None
    elif layout is Layout.WIKITEXT:
        found = _find_heading(data, position)
        # The blank line below a heading may not have arrived yet.
        if found is not None and not final and data.count(b"\n", found) < 2:
            found = None
    else:
        found = _find_plain_cut(data, position, origin)
    return len(data) if found is None and final else found


def document_starts(data: bytes, layout: Layout, origin: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each document of a text that begins and ends where documents do."""
    start = 0
    while start < len(data):
        end = find_start(data, start + 1, layout, origin, final=True)
        assert end is not None
        yield start, end
        start = end


def tidy(document: str) -> str:
    """Drop blank lines around a document and carriage returns before its line breaks."""
    body = document.rstrip(_ASCII_SPACE)
    indent = len(body) - len(body.lstrip(_ASCII_SPACE))
    start = body.rfind("\n", 0, indent) + 1
    return body[start:].replace("\r\n", "\n")


def _find_heading(data: bytes, position: int) -> int | None:
    """Position of the next level-one heading behind a line break: a line ` = Title = ` between blank lines.

    A section heading has a second `=` on both sides, and a line of a heading's look inside a paragraph has text above
    or below it.
    """
    for match in _LINE_LIKE_HEADING.finditer(data, position - 1):
        start = match.end()
        if _HEADING_LINE.match(data, start) and _BLANK_BEFORE.search(data, max(0, start - 256), start):
            return start
    return None


def _find_plain_cut(data: bytes, position: int, origin: int) -> int | None:
    """Next cut on the grid, of which each cell has at most one.

    A cell that begins before the data has had its cut there, and one that the data does not fill has none, so where
    the data begins and ends changes nothing.
    """
    cell = max(1, (origin + position - 1) // PLAIN_GRID_BYTES, -(-origin // PLAIN_GRID_BYTES))
    while (high := (cell + 1) * PLAIN_GRID_BYTES - origin) <= len(data):
        low = high - PLAIN_GRID_BYTES
        paragraph = _PARAGRAPH.search(data, low, high)
        places = (paragraph.end() if paragraph else 0, data.find(b"\n", low, high) + 1, data.find(b" ", low, high) + 1)
        cut = next((place for place in places if place), 0)
        if cut >= position:
            return cut
        cell += 1
    return None
