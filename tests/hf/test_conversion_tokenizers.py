"""Exported tokenizers give the ids of training and decode what they encode."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from more_megatron.errors import MoREError
from more_megatron.hf.conversion.tokenizer_files import open_tokenizer, plan_tokenizer
from tests.helpers.corpus import sample_text

_EXACT = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS: dict[str, dict[str, Any]] = {
    # As tools/preprocess_wikitext.py trains.
    "ours": {"model_type": "bpe", "split_digits": True, "allow_whitespace_only_pieces": True, **_EXACT},
    "bpe, nfkc": {"model_type": "bpe", "pad_id": 3},
    "bpe, nfkc, all spaces": {"model_type": "bpe", "remove_extra_whitespaces": False},
    "bpe, own pieces": {"model_type": "bpe", "user_defined_symbols": ["<sep>"], "add_dummy_prefix": False, **_EXACT},
    "unigram": {"model_type": "unigram", **_EXACT},
    "bpe, fewer spaces": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "unigram, nfkc": {"model_type": "unigram"},
}
_KEEPS_EVERYTHING = ("ours", "bpe, own pieces")


@pytest.fixture(scope="module")
def text() -> str:
    """Return English, with what WikiText writes for rare words."""
    return sample_text(150_000) + "\n the <unk> of <unk> , and </s> \u00e9\u4e2d\n"


def _args(kind: str, model: Path, **values: Any) -> argparse.Namespace:
    return argparse.Namespace(tokenizer_type=kind, tokenizer_model=str(model), max_position_embeddings=64, **values)


def train(text: str, path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a small SentencePiece model and return it."""
    model = io.BytesIO()
    lines = iter(text.splitlines())
    options = {"vocab_size": 600, "minloglevel": 2, "num_threads": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _exported(folder: Path, args: argparse.Namespace, rows: int = 640) -> Any:
    """Write the files beside a model's configuration, as in an export, and open them."""
    folder.mkdir()
    code = {"AutoConfig": "configuration_more.MoREConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "more", "auto_map": code}))
    planned = plan_tokenizer(args, rows)
    assert planned.write is not None
    planned.write(folder)
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (planned.eos_token_id, planned.pad_token_id)
    return tokenizer


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece(name: str, text: str, tmp_path: Path) -> None:
    processor = train(text, tmp_path / "model", **MODELS[name])
    tokenizer = _exported(tmp_path / "out", _args("SentencePieceTokenizer", tmp_path / "model"))
    literal = open_tokenizer(tmp_path / "out", literal=True)
    for line in [*text.splitlines(), text]:
        ids = literal(line)["input_ids"]
        assert ids == processor.encode(line)
        assert tokenizer(line, split_special_tokens=True)["input_ids"] == ids
        if "<" not in line:
            assert tokenizer(line)["input_ids"] == ids
        if name in _KEEPS_EVERYTHING:
            assert literal.decode(ids) == line
    # Both ends of a text are what Megatron puts between documents.
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == processor.eos_id()
    assert tokenizer.decode([*processor.encode("a b"), processor.eos_id()], skip_special_tokens=True) == "a b"
    assert tokenizer(["a", "a b a b a b"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_of_sentencepiece(name: str, text: str, tmp_path: Path) -> None:
    processor = train(text, tmp_path / "model", **MODELS[name])
    tokenizer = _exported(tmp_path / "out", _args("SentencePieceTokenizer", tmp_path / "model"))
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    assert tokenizer("a b" + end)["input_ids"] == [*processor.encode("a b"), processor.eos_id()]
    assert tokenizer(end + pad)["input_ids"] == [processor.eos_id(), tokenizer.pad_token_id]
    assert tokenizer("<unk>")["input_ids"] == [processor.unk_id()]
    # Collators leave padding out of the loss: the end of a text would never be learnt.
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    has_own = processor.pad_id() >= 0
    assert tokenizer.pad_token_id == (processor.pad_id() if has_own else processor.get_piece_size())
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "the film"}, {"role": "model", "content": "is good"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert [place for place, token in enumerate(ids) if token == processor.eos_id()][-1] == len(ids) - 1
    assert ids.count(processor.eos_id()) == 2
    assert tokenizer.add_tokens(["<|call|>"], special_tokens=True) == 1
    assert tokenizer("the<|call|>film")["input_ids"].count(len(tokenizer) - 1) == 1
    batch = tokenizer(["the film", "the"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0
    assert batch["attention_mask"][:, -1].all()


def test_padding_where_the_embedding_has_no_row_to_spare(text: str, tmp_path: Path) -> None:
    processor = train(text, tmp_path / "model", **MODELS["ours"])
    size = processor.get_piece_size()
    tokenizer = _exported(tmp_path / "out", _args("SentencePieceTokenizer", tmp_path / "model"), rows=size)
    assert tokenizer.pad_token_id == processor.unk_id()
    assert len(tokenizer) == size


def test_another_tokenizer_than_that_of_the_run_is_refused(text: str, tmp_path: Path) -> None:
    for name, options in (("model", MODELS["ours"]), ("other", MODELS["unigram"])):
        train(text, tmp_path / name, **options)
    args = _args("SentencePieceTokenizer", tmp_path / "model")
    other = str(tmp_path / "other")
    with pytest.raises(MoREError, match=f"--tokenizer-model {other} .* is not the tokenizer that the run was trained"):
        plan_tokenizer(args, 640, other)
    # The checkpoint says which it was, and its file is gone.
    options = TokenizerOptions.from_args(args)
    args.tokenizer_sha256 = tokenizer_sha256(options)
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(MoREError, match="is not the tokenizer that the run was trained with"):
        plan_tokenizer(args, 640, other)
    assert plan_tokenizer(args, 640, str(moved)).pad_token_id == 600
    moved.write_bytes((tmp_path / "other").read_bytes())
    args.tokenizer_model = str(moved)
    with pytest.raises(MoREError, match="is not the tokenizer that the run was trained with"):
        plan_tokenizer(args, 640)
    del args.tokenizer_sha256
    with pytest.raises(MoREError, match="has 600 tokens and the embedding 512 rows: it is not that of the run"):
        plan_tokenizer(args, 512)


def test_a_checkpoint_does_not_run_code_and_does_not_download(tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer:\n    pass\n")
    content = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    args = _args("HuggingFaceTokenizer", folder, trust_remote_code=True)
    with pytest.raises(MoREError, match="has code of its own: --trust-remote-code lets it run"):
        plan_tokenizer(args, 640)
    assert not ran.exists()
    with pytest.raises(MoREError):
        plan_tokenizer(args, 640, trust_remote_code=True)
    assert ran.exists()
    args.tokenizer_model = "someone/model"
    with pytest.raises(MoREError, match="someone/model, is not there: name its place with --tokenizer-model"):
        plan_tokenizer(args, 640)


def test_what_has_no_exact_counterpart_is_refused(text: str, tmp_path: Path) -> None:
    train(text, tmp_path / "model", model_type="bpe", user_defined_symbols=["<sep>"], byte_fallback=True)
    with pytest.raises(MoREError, match=r"cannot be exported exactly, .* --no-tokenizer leaves the tokenizer out"):
        _exported(tmp_path / "out", _args("Llama2Tokenizer", tmp_path / "model"))
    train(text, tmp_path / "model", model_type="word")
    with pytest.raises(MoREError, match="neither a BPE nor a unigram model"):
        _exported(tmp_path / "words", _args("GPTSentencePieceTokenizer", tmp_path / "model"))
    legacy = argparse.Namespace(
        **vars(_args("Llama2Tokenizer", tmp_path / "model")), tokenizer_sentencepiece_legacy=True
    )
    with pytest.raises(MoREError, match="special tokens beside the model"):
        plan_tokenizer(legacy, 640)
    with pytest.raises(MoREError, match="--tokenizer-type TikTokenizer has no files for AutoTokenizer"):
        plan_tokenizer(_args("TikTokenizer", tmp_path / "model"), 640)


def test_huggingface(text: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text.splitlines(), trainer)
    bpe.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    names = {"eos_token": special[0], "bos_token": special[1], "pad_token": special[0]}
    original = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    original.save_pretrained(tmp_path / "model")
    tokenizer = _exported(tmp_path / "out", _args("HuggingFaceTokenizer", tmp_path / "model"))
    ids = tokenizer(text)["input_ids"]
    assert ids == original(text)["input_ids"]
    assert ids[0] == 1
    assert tokenizer.decode(ids[1:]) == text
    with pytest.raises(MoREError, match="absent, is not there: name its place with --tokenizer-model"):
        plan_tokenizer(_args("HuggingFaceTokenizer", tmp_path / "absent"), 640)
    original.pad_token = None
    original.save_pretrained(tmp_path / "model")
    padded = _exported(tmp_path / "padded", _args("HuggingFaceTokenizer", tmp_path / "model"))
    assert padded.pad_token_id == 500
    assert padded(["the", "the film"], padding=True)["attention_mask"][0][0] == 0
    assert padded("the film")["input_ids"] == original("the film")["input_ids"]
    full = _exported(tmp_path / "full", _args("HuggingFaceTokenizer", tmp_path / "model"), rows=500)
    assert full.pad_token_id == full.eos_token_id
