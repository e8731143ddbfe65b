"""Every encoder gives the tokens of encoding documents one by one, for every kind of tokenizer and hostile text."""

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from more_megatron.data import fast
from more_megatron.data.encoding import Encoder, EncoderPlan, plan_encoder
from more_megatron.data.fast import DocumentError
from more_megatron.data.tokenizers import Tokenizer, TokenizerOptions, build_megatron, load
from tests.data.conftest import MODELS, TOOL, assert_one_line, expected_tokens, run_tool

_INSTALLED = importlib.util.find_spec("gigatoken") is not None
needs_gigatoken = pytest.mark.skipif(not _INSTALLED, reason="the extra `fast` is not installed")

FAST = {"bpe", "bpe_kept_spaces", "bpe_kept_nfkc", "bpe_no_prefix"}
HOSTILE = [
    *fast.HOSTILE_TEXTS, "\u2581 x", "x \u2581", "</s> <s> <unk> <pad> a</s>b <0x41> <sep> x<sep>y",
    "the theing\tthe the\u2581", "\u0627\u0644\u0633 \u202e abc \u202c \ufdfa", "word\n" * 50,
    "ab" * 8 + " " + "ab" * 8,
]  # fmt: skip
ALPHABET = st.one_of(
    st.sampled_from(list(" \n\t\0\r\u2581\u3000\u00a0\u200b\u0301\u00a8\x85\U0001f600\u00e9</s>aeth ")),
    st.characters(exclude_categories=["Cs"]),
)
WORDS = st.sampled_from(
    ["the", "statement", "is", "<sep>", "</s>", "object's", "\u2581", "\n", "", " ", "e\u0301", "x" * 20, ".\n", "123"]
)
TEXTS = st.one_of(st.text(ALPHABET, max_size=60), st.lists(WORDS, max_size=30).map(" ".join))
EOD = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"gpt2": True, "llama3": True, "bos": True, "nfc": True, "lstrip": True, "alone": False, "digits": False}


def check(encoder: Encoder, encode: Callable[[str], list[int]], eod: int, texts: list[str]) -> None:
    encoded = encoder.encode([text.encode() for text in texts])
    tokens, lengths = expected_tokens(texts, encode, eod)
    assert encoded.lengths.tolist() == lengths
    assert encoded.tokens.tolist() == tokens
    assert encoded.lengths.dtype == np.int32


@pytest.fixture(scope="session")
def plan_of(model_path: Callable[[str], str], corpus: list[str]) -> Callable[[str], EncoderPlan]:
    """Gives the plan for a SentencePiece model of `MODELS`."""

    @functools.cache
    def plan(name: str) -> EncoderPlan:
        tokenizer = load(TokenizerOptions("SentencePieceTokenizer", model_path(name)))
        return plan_encoder(tokenizer, True, [text.encode() for text in corpus])

    return plan


@pytest.fixture(scope="session")
def sides(plan_of: Callable[[str], EncoderPlan]) -> Callable[[str], tuple[Encoder, Any, int]]:
    """Gives the encoder under test, the plain way to encode and the end of a document, for a SentencePiece model."""

    @functools.cache
    def build(name: str) -> tuple[Encoder, Any, int]:
        plan = plan_of(name)
        processor = sentencepiece.SentencePieceProcessor(model_file=plan.tokenizer.options.tokenizer_model)
        return Encoder(plan), processor.encode_as_ids, processor.eos_id()

    return build


@needs_gigatoken
@pytest.mark.parametrize("name", MODELS)
def test_which_models_gigatoken_takes(name: str, plan_of: Callable[[str], EncoderPlan]) -> None:
    plan = plan_of(name)
    assert (plan.recipe is not None) == (name in FAST), plan.reason


@pytest.mark.parametrize("name", MODELS)
def test_corpus_and_hostile_text(name: str, sides: Callable, corpus: list[str]) -> None:
    encoder, encode, eod = sides(name)
    check(encoder, encode, eod, corpus[:60])
    for text in HOSTILE:
        check(encoder, encode, eod, [text])
    check(encoder, encode, eod, HOSTILE[::-1] * 2)
    check(encoder, encode, eod, [])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXTS, max_size=5))
def test_random_unicode(name: str, sides: Callable, texts: list[str]) -> None:
    check(*sides(name), texts)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_line_of_ten_megabytes(name: str, sides: Callable, corpus: list[str]) -> None:
    line = " ".join(" ".join(corpus).split())
    check(*sides(name), [(line * (10_000_000 // len(line) + 1))[:10_000_000], "short"])


def make_byte_level(kind: str, corpus: list[str]) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    steps = [byte_level(add_prefix_space=False, use_regex=kind != "llama3")]
    if kind == "llama3":
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"))
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
    elif kind == "lstrip":
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    elif kind == "alone":
        tokenizer.add_tokens([tokenizers.AddedToken("word", single_word=True)])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_sides(corpus: list[str]) -> Callable[[str], tuple[EncoderPlan, Encoder, Any]]:
    @functools.cache
    def build(kind: str) -> tuple[EncoderPlan, Encoder, Any]:
        backend = make_byte_level(kind, corpus)
        facts = Tokenizer(
            TokenizerOptions("HuggingFaceTokenizer", "unused"), backend.get_vocab_size(), 0, None, backend.to_str()
        )
        plan = plan_encoder(facts, True, [text.encode() for text in corpus])
        return plan, Encoder(plan), lambda text: backend.encode(text).ids

    return build


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level(kind: str, byte_level_sides: Callable, corpus: list[str]) -> None:
    plan, encoder, encode = byte_level_sides(kind)
    assert (plan.recipe is not None) == (BYTE_LEVEL[kind] and _INSTALLED), plan.reason
    check(encoder, encode, 0, corpus[:50])
    more = [f"a {EOD} b", f"x{EOD}", "a\u00a0 b", "a\n\n b .\n c", "word xword word", "a  <mask> b <mask>"]
    for text in [*HOSTILE, *more]:
        check(encoder, encode, 0, [text])
    check(encoder, encode, 0, [*HOSTILE, *more])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.one_of(TEXTS, st.sampled_from([EOD, " \n\n", "\u0085 "])), max_size=4))
def test_byte_level_random_unicode(kind: str, byte_level_sides: Callable, parts: list[str]) -> None:
    _, encoder, encode = byte_level_sides(kind)
    check(encoder, encode, 0, [*parts, " ".join(parts)])


def test_large_vocabulary_is_stored_in_int32(corpus: list[str]) -> None:
    backend = make_byte_level("gpt2", corpus)
    facts = Tokenizer(TokenizerOptions("HuggingFaceTokenizer", "unused"), 70_000, 69_999, None, backend.to_str())
    encoder = Encoder(plan_encoder(facts, True, []))
    texts = [*corpus[:10], "", "long" * 60]
    check(encoder, lambda text: backend.encode(text).ids, 69_999, texts)
    assert encoder.encode([b"a"]).tokens.dtype == np.int32


@pytest.mark.parametrize("kind", ["gpt2", "bos"])
@pytest.mark.parametrize("generic", [True, False])
def test_through_megatron(kind: str, generic: bool, tmp_path: Path, corpus: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=make_byte_level(kind, corpus), eos_token=EOD)
    tokenizer.save_pretrained(tmp_path)
    if not generic:
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    options = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path))
    facts, megatron = load(options), build_megatron(options)
    assert (facts.vocab_size, facts.eod) == (megatron.vocab_size, megatron.eod)
    inner = megatron._tokenizer.tokenizer.backend_tokenizer
    assert facts.backend == inner.to_str()
    encoder = Encoder(plan_encoder(facts, True, []))
    check(encoder, megatron.tokenize, megatron.eod, [*corpus[:20], "", "  ", f"a {EOD}"])


def test_generic_tokenizers_need_no_torch(tmp_path: Path, corpus: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=make_byte_level("gpt2", corpus), eos_token=EOD)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from more_megatron.data.tokenizers import load, TokenizerOptions; "
        f"load(TokenizerOptions('HuggingFaceTokenizer', {str(tmp_path)!r})); "
        "print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_other_tokenizers_are_batched(tmp_path: Path, corpus: list[str]) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=800, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus[::3], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]").save_pretrained(tmp_path)
    options = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path))
    facts, megatron = load(options), build_megatron(options)
    plan = plan_encoder(facts, True, [])
    assert plan.recipe is None
    assert "in batches" in plan.name
    check(Encoder(plan), megatron.tokenize, megatron.eod, [*corpus[:10], "", "  "])


@needs_gigatoken
def test_memory_is_bounded_by_starting_again(
    model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch, sides: Callable
) -> None:
    monkeypatch.setattr(fast, "_RENEW_BYTES", 20_000)
    built: list[object] = []
    renew = fast.FastEncode._renew
    monkeypatch.setattr(fast.FastEncode, "_renew", lambda self: built.append(0) or renew(self))
    tokenizer = load(TokenizerOptions("SentencePieceTokenizer", model_path("bpe")))
    encoder = Encoder(plan_encoder(tokenizer, True, []))
    built.clear()
    check(encoder, *sides("bpe")[1:], corpus[:60])
    # A document is not divided, so each turn has up to one more than it should.
    assert 5 < len(built) < 60


def tampered(change: Callable[[int, np.ndarray], np.ndarray]) -> Any:
    """gigatoken as a stand-in that changes the ids of the n-th document."""
    from gigatoken import Tokenizer as Real

    class Tokenizer:
        calls = 0

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        @classmethod
        def from_json(cls, data: str) -> "Tokenizer":
            return cls(Real.from_json(data))

        def encode(self, text: bytes) -> np.ndarray:
            Tokenizer.calls += 1
            return change(Tokenizer.calls, self.inner.encode(text))

    return Tokenizer


@needs_gigatoken
def test_difference_at_start_falls_back(
    model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(call: int, ids: np.ndarray) -> np.ndarray:
        return ids + 1 if call == 1000 else ids

    stand_in = tampered(change)
    monkeypatch.setattr("gigatoken.Tokenizer", stand_in)
    tokenizer = load(TokenizerOptions("SentencePieceTokenizer", model_path("bpe")))
    plan = plan_encoder(tokenizer, True, [text.encode() for text in corpus])
    assert plan.recipe is None
    assert "its ids differ from the reference's" in plan.reason


@needs_gigatoken
def test_difference_in_a_later_task_is_met(
    model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[bool] = []
    stand_in = tampered(lambda call, ids: np.append(ids[:-1], ids[-1:] ^ 1) if wrong else ids)
    monkeypatch.setattr("gigatoken.Tokenizer", stand_in)
    tokenizer = load(TokenizerOptions("SentencePieceTokenizer", model_path("bpe")))
    documents = [text.encode() for text in corpus]
    plan = plan_encoder(tokenizer, True, documents)
    assert plan.recipe is not None
    encoder = Encoder(plan)
    encoder.encode(documents[:10])
    wrong.append(True)
    with pytest.raises(DocumentError, match=r"document \d+ has other tokens by gigatoken"):
        encoder.encode(documents[10:20])


STAND_IN = """
import importlib.util, os, sys
sys.path.remove({folder!r})
del sys.modules["gigatoken"]
import gigatoken as real
sys.path.insert(0, {folder!r})
Real = real.Tokenizer
met = 0
class Tokenizer:
    def __init__(self, inner): self.inner = inner
    @classmethod
    def from_json(cls, data): return cls(Real.from_json(data))
    def encode(self, text):
        global met
        met += len(text)
        ids = self.inner.encode(text)
        return ids[::-1] if {wrong} and len(ids) > 3 else ids
real.Tokenizer = Tokenizer
sys.modules["gigatoken"] = real
"""


@needs_gigatoken
@pytest.mark.parametrize(
    ("workers", "wrong", "code"),
    [
        (1, "met > 2_500_000", 1),
        pytest.param(1, "True", 0, marks=pytest.mark.matrix),
        pytest.param(2, "met > 2_500_000", 1, marks=pytest.mark.matrix),
        pytest.param(2, "True", 0, marks=pytest.mark.matrix),
    ],
)
def test_tampered_library(
    wrong: str, code: int, workers: int, tmp_path: Path, model_path: Callable[[str], str], corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "gigatoken.py").write_text(STAND_IN.format(folder=str(tmp_path), wrong=wrong))
    (tmp_path / "in.txt").write_text("\n\n".join(corpus * 24))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--input", tmp_path / "in.txt", "--output-prefix", tmp_path / "x", "--workers", workers]
    result = run_tool(*arguments, "--tokenizer-model", model_path("bpe"), "--no-progress")
    assert result.returncode == code, result.stderr
    if code:
        found = re.search(r"document (\d+) has other tokens", result.stderr)
        assert found, result.stderr
        assert int(found[1]) > 300
        assert_one_line(result, "--encoder reference")
        assert not list(tmp_path.glob("x*"))
    else:
        assert "not gigatoken: its ids differ" in result.stderr
    (tmp_path / "in.txt").write_text("\n\n".join(corpus))
    plain = run_tool(*arguments, "--tokenizer-model", model_path("bpe"), "--encoder", "reference", "--verify")
    assert plain.returncode == 0
    assert "--encoder reference was given" in plain.stderr


def test_without_gigatoken(
    tmp_path: Path, model_path: Callable[[str], str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.modules['gigatoken'] = None; sys.path.insert(0, sys.argv.pop(1)); "
    code += "import preprocess_wikitext as tool; sys.exit(tool.main())"
    (tmp_path / "in.txt").write_text("\n\n".join(corpus))
    arguments = [
        "--input",
        tmp_path / "in.txt",
        "--tokenizer-model",
        model_path("bpe"),
        "--no-progress",
        "--workers",
        1,
    ]
    command = [sys.executable, "-c", code, TOOL.parent, *arguments, "--output-prefix", tmp_path / "x", "--verify"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "not gigatoken: it is not installed" in result.stderr
