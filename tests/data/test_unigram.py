"""A unigram model's words, where rounding of long sums makes their segmentation depend on the text before."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from more_megatron.data.sentencepiece_words import parse_model, unigram_lattice
from more_megatron.data.tokenizers import TokenizerOptions, build_encoder, load
from more_megatron.data.unigram import RESET, UnigramLattice
from more_megatron.data.unigram_batch import Segmentations, WordBatches
from more_megatron.data.unigram_words import UnigramEncoder, search_is_known
from tests.data.conftest import expected_tokens

pytestmark = pytest.mark.skipif(
    not search_is_known(sentencepiece.__version__), reason="another version of SentencePiece encodes such texts whole"
)
# Segmentations of these have nearly or exactly equal scores.
CLOSE = ["------", "....", "aaaa", "abababab", "1111", "======", "zzzzzz", "\u4e2d\u6587", "ééééé", "mmmm"]
MARK = "\u2581"
MODELS = ["unigram", "unigram_bytes", "unigram_kept_spaces"]


def build(path: str) -> UnigramEncoder:
    encoder = build_encoder(load(TokenizerOptions("SentencePieceTokenizer", path)), True)
    assert isinstance(encoder, UnigramEncoder)
    return encoder


def check(encoder: UnigramEncoder, path: str, texts: Sequence[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, processor.encode_as_ids, processor.eos_id())
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.tolist() == tokens


def write_unigram(path: Path, scores: dict[str, float]) -> None:
    """Write a model of some pieces that normalises nothing but spaces."""
    proto = sentencepiece_model_pb2.ModelProto()
    for name, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=name, type=kind)
    for piece, score in scores.items():
        proto.pieces.add(piece=piece, score=score, type=1)
    proto.trainer_spec.model_type = 1
    proto.normalizer_spec.name = "identity"
    path.write_bytes(proto.SerializeToString())


def read_lattice(path: str) -> UnigramLattice:
    with open(path, "rb") as stream:
        return unigram_lattice(parse_model(stream.read()))


def mixed(corpus: Sequence[str], words: int, close: float, seed: int = 0) -> list[str]:
    """Usual words, and a share of those whose segmentations are close."""
    choose = random.Random(seed)
    usual = " ".join(corpus).split()
    return [choose.choice(CLOSE if choose.random() < close else usual) for _ in range(words)]


def restarts(path: str, words: Sequence[str]) -> list[int]:
    """Words of a text in which SentencePiece starts again from zero."""
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    lattice = read_lattice(path)
    found = []
    total = 0.0
    for index, word in enumerate(words):
        _, after = lattice.segment_at(processor.normalize(word), total)
        if after > total:
            found.append(index)
        total = after
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("words", [3, 100, 2_000, 12_000, 40_000])
def test_long_documents(name: str, words: int, model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path(name)
    stream = mixed(corpus, max(2 * words, 60_000), 0.05, words)
    texts = [" ".join(stream[start : start + words]) for start in range(0, len(stream) - words + 1, words)]
    check(build(path), path, texts)


@pytest.mark.parametrize("name", MODELS)
def test_close_words_around_each_restart(name: str, model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path(name)
    words = mixed(corpus, 25_000, 0.0)
    for distance in (30, 3):
        for restart in restarts(path, words):
            around = slice(max(0, restart - distance), restart + distance)
            words[around] = mixed(corpus, len(words[around]), 0.7, restart)
    assert len(restarts(path, words)) >= 2
    check(build(path), path, [" ".join(words), "short", " ".join(words[1:])])


def test_documents_that_end_at_a_restart(model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path("unigram")
    words = mixed(corpus, 25_000, 0.02)
    texts = [
        " ".join(words[:end]) for restart in restarts(path, words)[:2] for end in range(restart - 12, restart + 12)
    ]
    check(build(path), path, texts)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_close_words(name: str, model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path(name)
    check(build(path), path, [" ".join(mixed(corpus, words, 1.0, words)) for words in (50, 500, 5_000, 20_000)])


def test_changed_words_move_the_next_restart(tmp_path: Path) -> None:
    path = tmp_path / "drift.model"
    # Rounding to 1/128 makes "a" and "b" score more than "ab", by so much that the totals of a text drift apart.
    write_unigram(path, {MARK: -9.0, f"{MARK}a": -5.0035, "b": -5.0035, f"{MARK}ab": -10.0045, f"{MARK}c": -3.3})
    words = ["ab", "c", "ab"] * 10_000
    assert len(restarts(str(path), words)) == 2
    check(build(str(path)), str(path), [" ".join(words), " ".join(words[1:])])


def test_every_strayed_word_is_followed(model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path("unigram")
    encoder = build(path)
    encoder._rounding = 0.0
    check(encoder, path, [" ".join(mixed(corpus, 30_000, 0.1))])


@pytest.mark.parametrize("window", [1 << 10, 1 << 14, 1 << 16])
def test_documents_larger_than_a_window(
    window: int, model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("more_megatron.data.wordencoder.WINDOW_BYTES", window)
    path = model_path("unigram_bytes")
    words = mixed(corpus, 30_000, 0.05)
    refused = [*words[:20_000], "x" * 300, *words[20_000:]]
    texts = [" ".join(words), "a b", "", " ".join(refused), " ".join(words[::-1]), " ".join(words[:300])]
    encoder = build(path)
    check(encoder, path, texts)
    check(encoder, path, texts[3:])


def test_unknown_search_encodes_whole(model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path("unigram")
    encoder = build(path)
    encoder._known_search = False
    check(encoder, path, [" ".join(mixed(corpus, words, 0.05)) for words in (10, 1_000, 12_000, 60_000)])


@pytest.mark.parametrize("name", MODELS)
def test_words_together_and_one_by_one(name: str, model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path(name)
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    lattice = read_lattice(path)
    words = sorted({*" ".join(corpus).split(), *CLOSE, "\U0001f600\u4e2dx", "x" * 250})
    texts = ["", *(processor.normalize(word) for word in words), ""]
    found = WordBatches(lattice.prefixes, lattice.unknown_score).segment(texts)
    expected = Segmentations.of([lattice.segment(text) for text in texts])
    for fact in ("pieces", "scores", "counts", "weights", "limits", "depths"):
        np.testing.assert_array_equal(getattr(found, fact), getattr(expected, fact))


@pytest.mark.parametrize("name", MODELS)
def test_words_of_which_normalisation_leaves_nothing(name: str, model_path: Callable[[str], str]) -> None:
    path = model_path(name)
    removed = " ".join("\x01" * size for size in range(1, 60))
    encoder = build(path)
    check(encoder, path, [removed])
    check(encoder, path, [f"a {removed} b", removed])


def test_search_in_three_arithmetics(model_path: Callable[[str], str], corpus: list[str]) -> None:
    path = model_path("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    lattice = read_lattice(path)
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
    lattice = read_lattice(model_path("unigram"))
    _, total = lattice.segment_at("\u2581the", -RESET - 1.0)
    assert -100.0 < total < 0.0
