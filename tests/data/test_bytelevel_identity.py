"""Hugging Face byte-level BPE by words gives the tokens of encoding documents whole."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from more_megatron.data.bytelevel_words import _EXPRESSIONS, plan_byte_level
from more_megatron.data.encoding import PlainEncoder
from more_megatron.data.tokenizers import Tokenizer, TokenizerOptions, build_encoder, build_megatron, load
from more_megatron.data.wordencoder import WordEncoder
from tests.data.conftest import expected_tokens
from tests.data.test_word_identity import HOSTILE, TEXTS

tokenizers = pytest.importorskip("tokenizers")

KINDS = ["gpt2", *(f"split{number}" for number in range(len(_EXPRESSIONS))), "bos", "nfc", "digits"]
EOD = "<|endoftext|>"
TEXT = st.lists(
    st.one_of(TEXTS, st.sampled_from([EOD, " \n\n", "\n ", "'s", "it's", ".\n", "\u00a0", "\u0085 ", "123"]))
)


def make(kind: str, corpus: list[str]) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    steps = [byte_level(add_prefix_space=False, use_regex=not kind.startswith("split"))]
    if kind.startswith("split"):
        expression = sorted(_EXPRESSIONS)[int(kind[5:])]
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"))
    elif kind == "digits":
        steps.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    elif kind == "nfc":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[EOD], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus[::3], trainer)
    if kind == "bos":
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{EOD} $A {EOD}", special_tokens=[(EOD, 0)]
        )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of(corpus: list[str]) -> Callable[[str], Any]:
    return functools.cache(lambda kind: make(kind, corpus))


@pytest.fixture(scope="session")
def encoder_of(tokenizer_of: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.cache
    def build(kind: str) -> Any:
        backend = tokenizer_of(kind)
        options = TokenizerOptions("HuggingFaceTokenizer", "unused")
        facts = Tokenizer(options, backend.get_vocab_size(), 0, None, "", backend.to_str())
        return build_encoder(facts, True)

    return build


def check(encoder: Any, tokenizer: Any, texts: list[str]) -> None:
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, lambda text: tokenizer.encode(text).ids, 0)
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.tolist() == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_and_hostile_text(kind: str, encoder_of: Callable, tokenizer_of: Callable, corpus: list[str]) -> None:
    encoder, tokenizer = encoder_of(kind), tokenizer_of(kind)
    assert isinstance(encoder, WordEncoder)
    check(encoder, tokenizer, corpus[:50])
    for text in HOSTILE:
        check(encoder, tokenizer, [text])
    check(
        encoder,
        tokenizer,
        [*HOSTILE, f"a {EOD} b", f"x{EOD}", "a\u00a0 b", "\u3000 a\u3000 b \u1680 c", "a\n\n b .\n c"],
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(TEXT, max_size=4))
def test_random_unicode(kind: str, encoder_of: Callable, tokenizer_of: Callable, parts: list[list[str]]) -> None:
    check(
        encoder_of(kind),
        tokenizer_of(kind),
        [separator.join(part) for separator, part in zip(" \n .", parts, strict=False)],
    )


def test_large_vocabulary_is_stored_in_int32(tokenizer_of: Callable, corpus: list[str]) -> None:
    backend = tokenizer_of("gpt2")
    facts = Tokenizer(TokenizerOptions("HuggingFaceTokenizer", "unused"), 70_000, 69_999, None, "", backend.to_str())
    texts = [*corpus[:10], "", "long" * 60]
    encoded = build_encoder(facts, True).encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, lambda text: backend.encode(text).ids, 69_999)
    assert encoded.tokens.dtype == np.int32
    assert encoded.tokens.tolist() == tokens
    assert encoded.lengths.tolist() == lengths


def test_refusals(corpus: list[str]) -> None:
    prefixed = make("gpt2", corpus[:30])
    prefixed.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "pre-tokenizer" in str(plan_byte_level(prefixed))
    lower = make("gpt2", corpus[:30])
    lower.normalizer = tokenizers.normalizers.Lowercase()
    assert "Lowercase" in str(plan_byte_level(lower))
    added = make("gpt2", corpus[:30])
    added.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    assert "<mask>" in str(plan_byte_level(added))


def test_through_megatron(tmp_path: Path, tokenizer_of: Callable, corpus: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    for kind in ("gpt2", "bos"):
        folder = tmp_path / kind
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind), eos_token=EOD).save_pretrained(folder)
        options = TokenizerOptions("HuggingFaceTokenizer", str(folder))
        facts = load(options)
        megatron = build_megatron(options)
        assert (facts.vocab_size, facts.eod) == (megatron.vocab_size, megatron.eod)
        encoder = build_encoder(facts, True)
        assert isinstance(encoder, WordEncoder)
        encoded = encoder.encode([text.encode() for text in corpus[:20]])
        tokens, lengths = expected_tokens(corpus[:20], megatron.tokenize, megatron.eod)
        assert encoded.tokens.tolist() == tokens
        assert encoded.lengths.tolist() == lengths


def test_other_tokenizers_are_batched(tmp_path: Path, corpus: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=800, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus[::3], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]").save_pretrained(tmp_path)
    options = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path))
    facts = load(options)
    megatron = build_megatron(options)
    encoder = build_encoder(facts, True)
    assert isinstance(encoder, PlainEncoder)
    texts = [*corpus[:10], "", "  "]
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, megatron.tokenize, megatron.eod)
    assert encoded.tokens.tolist() == tokens
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.dtype == np.uint16
