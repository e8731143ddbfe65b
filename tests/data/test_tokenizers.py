"""What the tool says of a tokenizer is what Megatron's own answers."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from more_megatron.data.encoding import Encoder, plan_encoder
from more_megatron.data.fast import DocumentError
from more_megatron.data.tokenizers import (
    TokenizerOptions,
    TokenizerType,
    build_megatron,
    load,
    tokenizer_sha256,
)
from more_megatron.errors import MoREError
from tests.data.conftest import expected_tokens, run_tool
from tools.inspect_dataset import decode


def test_every_type_of_megatron_is_known() -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import SUPPORTED_TOKENIZERS

    assert set(SUPPORTED_TOKENIZERS) == {kind.value for kind in TokenizerType}


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_sentencepiece_ignore_extra_whitespaces": False},
        {"tokenizer_sentencepiece_legacy": True, "special_tokens": ("<mask>", "object")},
    ],
)
def test_sentencepiece_agrees_with_megatron(
    kind: str, changes: dict, model_path: Callable[[str], str], corpus: list[str]
) -> None:
    options = TokenizerOptions(kind, model_path("bpe"), **changes)
    facts = load(options)
    megatron = build_megatron(options)
    assert facts.vocab_size == megatron.vocab_size
    # Megatron's legacy wrapper knows no end of document.
    assert facts.eod == (None if options.tokenizer_sentencepiece_legacy else megatron.eod)
    texts = [*corpus[:10], "", "  a  <mask>  object b "]
    documents = [text.encode() for text in texts]
    encoded = Encoder(plan_encoder(facts, True, documents)).encode(documents)
    tokens, lengths = expected_tokens(texts, megatron.tokenize, facts.eod)
    assert encoded.tokens.tolist() == tokens
    assert encoded.lengths.tolist() == lengths
    if not changes:
        assert decode(options, tokens[: lengths[0] - 1]) == megatron.detokenize(tokens[: lengths[0] - 1])


def test_null_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"{number} 7 9"}) + "\n" for number in range(50)))
    arguments = [
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "n",
        "--tokenizer-type",
        "NullTokenizer",
    ]
    result = run_tool(*arguments, "--vocab-size", 100)
    assert result.returncode == 0, result.stderr
    assert "50 documents, 200 tokens" in result.stderr
    facts = load(TokenizerOptions("NullTokenizer", vocab_size=70000))
    assert (facts.vocab_size, facts.eod, facts.sha256, facts.dtype.name) == (70000, 69999, None, "int32")
    encoder = Encoder(plan_encoder(facts, True, []))
    assert encoder.encode([b"66000 1"]).tokens.tolist() == [66000, 1, 69999]
    with pytest.raises(DocumentError, match="document 1 gives the id 70000, the tokenizer has 0 to 69999"):
        encoder.encode([b"66000 1", b"3 70000"])
    with pytest.raises(DocumentError, match=r"document 1 cannot be encoded by NullTokenizer.*reads numbers"):
        encoder.encode([b"1", b"words", b"2"])
    with pytest.raises(MoREError, match="with the id -5 and has 0 to 99: change --null-tokenizer-eod-id"):
        load(TokenizerOptions("NullTokenizer", vocab_size=100, null_tokenizer_eod_id=-5))
    with pytest.raises(MoREError, match="a dataset holds 2147483648"):
        load(TokenizerOptions("NullTokenizer", vocab_size=1 << 32))
    with pytest.raises(MoREError, match="NullTokenizer needs --vocab-size"):
        load(TokenizerOptions("NullTokenizer"))


def test_hash_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(b"a")
    one = tokenizer_sha256(TokenizerOptions("SentencePieceTokenizer", str(tmp_path / "a.model")))
    folder = tokenizer_sha256(TokenizerOptions("HuggingFaceTokenizer", str(tmp_path)))
    assert one == folder
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_sha256(TokenizerOptions("HuggingFaceTokenizer", str(tmp_path))) not in (one, None)
    assert tokenizer_sha256(TokenizerOptions("HuggingFaceTokenizer", "some/name")) is None


def test_missing_end_of_document(tmp_path: Path, corpus: list[str]) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[0].split("\n")), model_writer=model, vocab_size=200, eos_id=-1, bos_id=-1,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "m.model").write_bytes(model.getvalue())
    (tmp_path / "in.txt").write_text(corpus[0])
    arguments = [
        "--input",
        tmp_path / "in.txt",
        "--output-prefix",
        tmp_path / "o",
        "--tokenizer-model",
        tmp_path / "m.model",
    ]
    result = run_tool(*arguments)
    assert result.returncode == 1
    assert "no end-of-document" in result.stderr
    assert run_tool(*arguments, "--no-append-eod").returncode == 0


def test_unknown_type() -> None:
    with pytest.raises(MoREError, match="Nonsense is not known"):
        load(TokenizerOptions("Nonsense", "x"))


def test_compressed_input_is_read_by_all_workers(
    tmp_path: Path, model_path: Callable[[str], str], corpus: list[str]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus) * 6
    (tmp_path / "plain.jsonl").write_text(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        arguments = [
            "--input",
            tmp_path / name,
            "--output-prefix",
            tmp_path / name,
            "--tokenizer-model",
            model_path("bpe"),
        ]
        assert run_tool(*arguments, "--workers", 2).returncode == 0
    for end in (".bin", ".idx"):
        files = [tmp_path / f"{name}_text_document{end}" for name in ("plain.jsonl", "packed.jsonl.gz")]
        assert len({path.read_bytes() for path in files}) == 1
