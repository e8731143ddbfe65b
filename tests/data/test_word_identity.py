"""Encoding by words gives the tokens of encoding documents whole, for every kind of model and hostile text."""

from collections.abc import Callable

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from more_megatron.data.encoding import Encoder, PlainEncoder
from more_megatron.data.tokenizers import TokenizerOptions, build_encoder, load
from more_megatron.data.wordencoder import WordEncoder
from tests.data.conftest import MODELS, expected_tokens

WHOLE = {"bpe_across", "bpe_suffix", "unigram_symbols"}
HOSTILE = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "a",
    " a",
    "a ",
    "a  b",
    "  a   b    c  ",
    "\ta\tb\t",
    "a\0b \0 c\0",
    "\0",
    "\u2581",
    "a\u2581b \u2581 c \u2581\u2581d\u2581",
    "\u2581 x",
    "x \u2581",
    "emoji 😀😀 👩‍👩‍👧‍👦 x",
    "e\u0301 a\u0308 \u0301 \u0308a",
    "\u00a8 \u00b4x y\u00a8",
    "\u0627\u0644\u0633 \u202e abc \u202c \ufdfa",
    "a\r\nb\r\n\r\nc",
    "</s> <s> <unk> a</s>b <0x41> <sep> x<sep>y",
    "the theing\tthe the\u2581",
    "\u3000a\u3000 \u3000b",
    "a\u3000 b \u00a0 c\u00a0",
    "\u200b a \u200b b\u200b",
    "\x1c\x1d\x1e\x1f a\x0b \x0c b\x7f",
    "\x85 \u2028 \u2029 x",
    "\ufeff a \ufffd b",
    "word\n" * 50,
    "x" * 300 + " y",
    "x" * 16 + " " + "x" * 17 + " " + "x" * 8 + " " + "x" * 9,
    "ab" * 8 + " " + "ab" * 8 + "c",
    "12345 67890 " * 10,
    "中文没有空格的句子。" * 10,
    "\U0010ffff \ue000 \ud7ff",
]
ALPHABET = st.one_of(
    st.sampled_from(list(" \n\t\0\r\u2581\u3000\u00a0\u200b\u0301\u00a8😀é</s>aeth ")),
    st.characters(exclude_categories=["Cs"]),
)
WORDS = st.sampled_from(
    ["the", "statement", "is", "<sep>", "</s>", "object's", "\u2581", "\n", "", " ", "e\u0301", "x" * 20]
)
TEXTS = st.one_of(st.text(ALPHABET, max_size=60), st.lists(WORDS, max_size=30).map(" ".join))


@pytest.fixture(scope="session")
def encoders(model_path: Callable[[str], str]) -> Callable[[str], tuple[Encoder, sentencepiece.SentencePieceProcessor]]:
    """Gives the encoder under test and the plain processor of a model."""
    cache: dict[str, tuple[Encoder, sentencepiece.SentencePieceProcessor]] = {}

    def build(name: str) -> tuple[Encoder, sentencepiece.SentencePieceProcessor]:
        if name not in cache:
            path = model_path(name)
            tokenizer = load(TokenizerOptions("SentencePieceTokenizer", path))
            cache[name] = (build_encoder(tokenizer, True), sentencepiece.SentencePieceProcessor(model_file=path))
        return cache[name]

    return build


def check(encoder: Encoder, processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, processor.encode_as_ids, processor.eos_id())
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.tolist() == tokens


@pytest.mark.parametrize("name", MODELS)
def test_kind_of_encoder(name: str, encoders: Callable) -> None:
    kind = PlainEncoder if name in WHOLE else WordEncoder
    assert isinstance(encoders(name)[0], kind)


@pytest.mark.parametrize("name", MODELS)
def test_corpus(name: str, encoders: Callable, corpus: list[str]) -> None:
    check(*encoders(name), corpus[:60])


@pytest.mark.parametrize("name", MODELS)
def test_hostile_text(name: str, encoders: Callable) -> None:
    encoder, processor = encoders(name)
    for text in HOSTILE:
        check(encoder, processor, [text])
    check(encoder, processor, HOSTILE)
    check(encoder, processor, HOSTILE[::-1] * 2)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXTS, max_size=5))
def test_random_unicode(name: str, encoders: Callable, texts: list[str]) -> None:
    check(*encoders(name), texts)


def test_line_of_ten_megabytes(encoders: Callable, corpus: list[str]) -> None:
    line = " ".join(" ".join(corpus).split())
    check(*encoders("bpe"), [(line * (10_000_000 // len(line) + 1))[:10_000_000], "short"])


def test_words_longer_than_a_window(encoders: Callable) -> None:
    check(*encoders("bpe"), ["a" * 700_000, "b c", "d" * 300_000 + " e " + "f" * 300_000])


def test_long_words_are_not_kept(encoders: Callable) -> None:
    encoder, processor = encoders("bpe_no_prefix")
    check(encoder, processor, ["x" * 257, "a " + "y" * 257 + " " + "y" * 256, "z" * 256 + " a"])
    assert max(map(len, encoder._table._long)) == max(map(len, encoder._heads)) == 256


def test_full_table_starts_again(
    model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("more_megatron.data.wordtable._SLOT_BITS", 12)
    path = model_path("bpe")
    encoder = build_encoder(load(TokenizerOptions("SentencePieceTokenizer", path)), True)
    encoder._table._capacity = 300  # type: ignore[attr-defined]
    for start in range(0, 40, 4):
        check(encoder, sentencepiece.SentencePieceProcessor(model_file=path), corpus[start : start + 4])


@pytest.mark.parametrize("window", [1 << 10, 1 << 19])
@pytest.mark.parametrize("name", ["bpe", "bpe_no_prefix", "unigram"])
def test_documents_with_much_new_are_encoded_whole(
    name: str, window: int, model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("more_megatron.data.wordencoder.WINDOW_BYTES", window)
    monkeypatch.setattr("more_megatron.data.wordencoder._EAGERNESS", 0.0)
    monkeypatch.setattr("more_megatron.data.wordencoder._INVESTMENT", 0.0)
    path = model_path(name)
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    encoder = build_encoder(load(TokenizerOptions("SentencePieceTokenizer", path)), True)
    assert isinstance(encoder, WordEncoder)
    whole: list[str] = []
    encode_whole = encoder._encode_whole
    monkeypatch.setattr(encoder, "_encode_whole", lambda text: whole.append(text) or encode_whole(text))
    check(encoder, processor, corpus[:30])
    assert whole == corpus[:30]
    # Text of which that is true rests from being looked up.
    assert sum(map(len, whole)) > 1 << 16
    assert encoder._rest == 7
    check(encoder, processor, corpus[:1])
    assert whole.pop() == corpus[0]
    encoder._rest = 0
    monkeypatch.setattr("more_megatron.data.wordencoder._EAGERNESS", 1e6)
    encoder._eagerness = 1e6
    check(encoder, processor, corpus[:30])
    assert len(whole) == 30
    encoder._eagerness = 0.0
    monkeypatch.setattr("more_megatron.data.wordencoder._EAGERNESS", 0.0)
    # Known words and a few others, and nothing but others.
    mixed = [corpus[0] + " qvx zkw", " ".join(f"zq{number}" for number in range(200)), corpus[1]]
    check(encoder, processor, mixed)
    assert whole[30:] == mixed[1:2]


def test_lengths_have_megatrons_dtype(encoders: Callable) -> None:
    encoded = encoders("bpe")[0].encode([b"a b", b""])
    assert encoded.lengths.dtype == np.int32
    assert encoded.tokens.dtype == np.uint16
