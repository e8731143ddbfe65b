"""Documents of WikiText and of other text, wherever the text is cut for the workers."""

import pytest

from more_megatron.data.detokenize import Detokenize, detokenize
from more_megatron.data.documents import PLAIN_GRID_BYTES, Layout, document_starts, sniff_layout, tidy
from more_megatron.data.reading import cut_blocks

WIKITEXT = (
    " \n = First = \n \n Text of the first . \n"
    " = looks like a heading = \n more of the first . \n \n = = Section = = \n \n Text . \n"
    " \n = = = Deep = = = \n \n 2 + 2 = 4 . \n \n"
    " = Second = 2 = \n \n Text . \n \n = X = \n \n Last . \n"
)


def titles(data: bytes, layout: Layout) -> list[str]:
    texts = [tidy(data[start:end].decode()) for start, end in document_starts(data, layout, 0)]
    return [text.split("\n")[0] for text in texts if text]


def test_level_one_headings_begin_documents() -> None:
    assert sniff_layout(WIKITEXT.encode()) is Layout.WIKITEXT
    assert titles(WIKITEXT.encode(), Layout.WIKITEXT) == [" = First = ", " = Second = 2 = ", " = X = "]


def test_heading_needs_blank_lines_around_it() -> None:
    assert sniff_layout(b"Dear all,\n = not one = \nbye\n") is Layout.PLAIN
    assert sniff_layout(b"text\n\n = not one = \nbye\n") is Layout.PLAIN
    assert sniff_layout(b" = = Section = = \n\n text\n") is Layout.PLAIN
    assert sniff_layout(b"= One =\n\n text\n") is Layout.WIKITEXT


def test_carriage_returns() -> None:
    data = WIKITEXT.replace("\n", "\r\n").encode()
    assert titles(data, Layout.WIKITEXT) == [" = First = ", " = Second = 2 = ", " = X = "]
    assert "\r" not in tidy(data.decode())


def play(lines: int) -> bytes:
    parts = [f"SPEAKER {number}:\nLine {number} of a play.\n" + ("\n" if number % 3 else "") for number in range(lines)]
    return "".join(parts).encode()


def test_play_has_enough_documents_to_split() -> None:
    data = play(20_000)
    documents = [data[start:end] for start, end in document_starts(data, Layout.PLAIN, 0)]
    assert b"".join(documents) == data
    assert len(data) // PLAIN_GRID_BYTES - 1 <= len(documents)
    assert max(map(len, documents)) <= 2 * PLAIN_GRID_BYTES
    assert all(document.startswith(b"SPEAKER") for document in documents)


@pytest.mark.parametrize("text", [b"x" * 50_000, b"word " * 10_000, b"line\n" * 10_000, b"", b"a\n\nb"])
def test_plain_text_without_paragraphs(text: bytes) -> None:
    documents = [text[start:end] for start, end in document_starts(text, Layout.PLAIN, 0)]
    assert b"".join(documents) == text
    assert all(document[-1:] in b" \n" for document in documents[:-1])


@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.WIKITEXT, Layout.JSONL])
@pytest.mark.parametrize("block_bytes", [1, 7, 100, 4096, 5000, 1 << 20])
def test_blocks_do_not_change_documents(layout: Layout, block_bytes: int) -> None:
    data = play(1_500) if layout is Layout.PLAIN else (WIKITEXT * 20).encode()
    if layout is Layout.PLAIN and block_bytes < 100:
        pytest.skip("covered by the other sizes")
    whole = [data[start:end] for start, end in document_starts(data, layout, 0)]
    pieces = []
    chunks = (data[start : start + 37] for start in range(0, len(data), 37))
    for origin, block in cut_blocks(chunks, layout, block_bytes):
        pieces += [block[start:end] for start, end in document_starts(block, layout, origin)]
    assert pieces == whole


def test_detokenize() -> None:
    text = 'A well @-@ known 1 @,@ 000 @.@ 5 , ( see " it " ) of Tom \'s <unk> .'
    assert detokenize(text, Detokenize.NONE) == text
    assert detokenize(text, Detokenize.JOINERS) == 'A well-known 1,000.5 , ( see " it " ) of Tom \'s <unk> .'
    assert detokenize(text, Detokenize.FULL) == 'A well-known 1,000.5, (see "it") of Tom\'s <unk>.'
