"""A SentencePiece model as a `tokenizer.json`, which transformers reads without any code of ours."""

import json
from pathlib import Path
from typing import Any

from more_megatron.data.sentencepiece_models import bpe, read_model, text_scores, unknown_piece
from more_megatron.errors import MoREError

_NEVER = -1000.0
_MARK = "\u2581"


def write_sentencepiece(model: Path, folder: Path, max_length: int, pad: str) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and a copy of the model.

    As in training, no token is put before or after a text. Both ends of a text are the token that Megatron puts between
    documents. Names of special tokens in a text are these tokens, as in other tokenizers of transformers, unless
    `split_special_tokens` says that they are text, as they were in training.

    Args:
        model: The SentencePiece model.
        folder: Where to.
        max_length: Longest sequence, in tokens.
        pad: Token that fills up a batch; it is added behind the others if the model does not have it.

    Raises:
        MoREError: If the model's segmentation is neither BPE nor unigram.
    """
    proto = read_model(model)
    tokenizer = _tokenizer(proto, model, pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = proto.pieces[proto.trainer_spec.eos_id].piece if proto.trainer_spec.eos_id >= 0 else None
    specials = {"bos_token": end, "eos_token": end, "unk_token": unknown_piece(proto)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in specials.items() if token is not None},
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "tokenizer.model").write_bytes(model.read_bytes())


def _tokenizer(proto: Any, model: Path, pad: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, models

    trainer, kinds = proto.trainer_spec, proto.SentencePiece
    segmentation: Any
    if trainer.model_type == trainer.BPE:
        segmentation = bpe(proto)
    elif trainer.model_type == trainer.UNIGRAM:
        # So low for those outside of texts that any other way is better.
        scores = text_scores(proto)
        pieces = [(piece.piece, scores.get(piece.piece, _NEVER)) for piece in proto.pieces]
        segmentation = models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    else:
        raise MoREError(f"{model} is neither a BPE nor a unigram model: --no-tokenizer leaves the tokenizer out")
    tokenizer = Tokenizer(segmentation)
    tokenizer.normalizer = _normalizer(proto)
    if trainer.model_type == trainer.UNIGRAM:
        tokenizer.pre_tokenizer = _unknown_runs(proto)
    tokenizer.decoder = _decoder(proto)
    for piece in proto.pieces:
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == kinds.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    tokenizer.add_special_tokens([AddedToken(pad, normalized=False, special=True)])
    return tokenizer


def _unknown_runs(proto: Any) -> Any:
    """Return what cuts out runs of characters that no piece has.

    No piece reaches over them, and without them the name of a special token is never matched as a whole where the model
    lacks one of its characters.
    """
    from tokenizers import Regex, pre_tokenizers

    known = {character for piece in text_scores(proto) for character in piece}
    pattern = "[^" + "".join(f"\\x{{{ord(character):X}}}" for character in sorted(known)) + "]+"
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        # The two together are one character to it.
        if steps[0].normalize_str("\r") == steps[0].normalize_str("\n"):
            steps.insert(0, normalizers.Replace("\r\n", "\n\n"))
    if spec.remove_extra_whitespaces:
        # A mark at the end of a text is a space to SentencePiece.
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_MARK}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _MARK))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    spec = proto.normalizer_spec
    steps = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
