"""A unigram model's words, where rounding of long sums makes their segmentation depend on the text before."""

import random
from collections.abc import Callable

import pytest
import sentencepiece

from more_megatron.data.sentencepiece_words import parse_model, unigram_lattice
from more_megatron.data.tokenizers import TokenizerOptions, build_encoder, load
from more_megatron.data.unigram import RESET
from more_megatron.data.unigram_words import UnigramEncoder, search_is_known
from tests.data.conftest import expected_tokens

pytestmark = pytest.mark.skipif(
    not search_is_known(sentencepiece.__version__), reason="another version of SentencePiece encodes such texts whole"
)
# Segmentations of these have nearly or exactly equal scores.
CLOSE = ["------", "....", "aaaa", "abababab", "1111", "======", "zzzzzz", "\u4e2d\u6587", "ééééé", "mmmm"]


@pytest.mark.parametrize("name", ["unigram", "unigram_bytes", "unigram_kept_spaces"])
@pytest.mark.parametrize("words", [3, 100, 2_000, 12_000, 40_000])
def test_long_documents(name: str, words: int, model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path(name)
    encoder = build_encoder(load(TokenizerOptions("SentencePieceTokenizer", path)), True)
    assert isinstance(encoder, UnigramEncoder)
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    choose = random.Random(words)
    usual = " ".join(corpus).split()
    texts = [
        " ".join(choose.choice(CLOSE if choose.random() < 0.05 else usual) for _ in range(words))
        for _ in range(max(2, 60_000 // words))
    ]
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, processor.encode_as_ids, processor.eos_id())
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.tolist() == tokens


def test_search_in_three_arithmetics(model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    with open(path, "rb") as stream:
        lattice = unigram_lattice(parse_model(stream.read()))
    words = sorted(set(" ".join(corpus[:50]).split()) | set(CLOSE))
    for word in words:
        text = processor.normalize(word)
        exact = lattice.segment(text)
        assert lattice.segment_at(text, 0.0)[0] == processor.encode_as_ids(word)
        for exponent in (8, 12, 17):
            found = lattice.segment_in_range(text, exponent)
            start = -(2.0 ** (exponent - 1)) * 1.4
            if found is not None:
                assert found.tokens == lattice.segment_at(text, start)[0]
            if exact.limit >= -start:
                assert exact.tokens == lattice.segment_at(text, start)[0]


def test_start_from_zero(model_path: Callable[[str], str]) -> None:
    with open(model_path("unigram"), "rb") as stream:
        lattice = unigram_lattice(parse_model(stream.read()))
    _, total = lattice.segment_at("\u2581the", -RESET - 1.0)
    assert -100.0 < total < 0.0
