"""The reference of a tokenizer: the library that defines its ids, below Megatron's wrapper or the wrapper itself.

Each says how gigatoken could encode as it does. gigatoken only segments; everything around it stays with the reference:

- SentencePiece BPE: SentencePiece normalises, and gigatoken joins the characters. It knows only pieces that are found
  by merging, so models with user-defined or unused pieces are refused, and so are pieces of equal score, between which
  SentencePiece goes from left to right. Control pieces must not be found in a text, so no merge leads to one.
- Byte-level BPE: gigatoken splits and joins, and the special tokens around a text are put there by us.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from more_megatron.data.fast import DocumentError, Recipe
from more_megatron.data.sentencepiece_models import bpe, read_model, text_scores
from more_megatron.data.tokenizers import (
    NULL_TYPES,
    Tokenizer,
    build_megatron,
    is_direct_sentencepiece,
    open_sentencepiece,
)
from more_megatron.errors import last_line

_SHORT = 100


class Reference:
    """What defines the ids of a tokenizer, and its name. Documents come as UTF-8."""

    name: str

    def encode(self, documents: Sequence[bytes]) -> Sequence[ArrayLike]:
        """Return the ids of each document."""
        raise NotImplementedError

    def recipe(self) -> Recipe | str:
        """Describe the tokenizer to gigatoken, or say why it cannot be."""
        return "it does not know this type of tokenizer"

    def normalize(self, documents: Sequence[bytes]) -> Sequence[bytes]:
        """Return what is left of each document for gigatoken to segment."""
        return documents

    def pieces(self) -> list[str]:
        """Return every piece of the vocabulary as a text."""
        return []


@functools.lru_cache(1)
def open_reference(tokenizer: Tokenizer) -> Reference:
    """Open the library that defines the ids of a tokenizer."""
    if is_direct_sentencepiece(tokenizer.options):
        return _SentencePiece(tokenizer)
    return _Tokenizers(tokenizer) if tokenizer.backend is not None else _Megatron(tokenizer)


class _SentencePiece(Reference):
    def __init__(self, tokenizer: Tokenizer) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        self._model = str(tokenizer.options.tokenizer_model)
        self._processor = open_sentencepiece(tokenizer.options)

    def encode(self, documents: Sequence[bytes]) -> Sequence[ArrayLike]:
        encode = self._processor.encode_as_ids
        # Arrays are cheaper than lists of Python integers, but for short texts; older versions have only lists.
        if sum(map(len, documents)) > _SHORT * len(documents):
            encode = getattr(self._processor, "encode_as_numpy", encode)
        ids: Sequence[ArrayLike] = encode(list(documents), num_threads=1)
        return ids

    def normalize(self, documents: Sequence[bytes]) -> Sequence[bytes]:
        normalized: list[bytes] = self._processor.normalize(list(documents))
        return normalized

    def pieces(self) -> list[str]:
        ids = range(self._processor.get_piece_size())
        return [piece.replace("\u2581", " ") for piece in self._processor.id_to_piece(list(ids))]

    def recipe(self) -> Recipe | str:
        from tokenizers import Tokenizer as Segmenter

        proto = read_model(self._model)
        kinds, types = proto.SentencePiece, {piece.type for piece in proto.pieces}
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            return "it does not know the model's algorithm"
        if not proto.trainer_spec.byte_fallback:
            return "it does not know models without byte fallback"
        if types & {kinds.USER_DEFINED, kinds.UNUSED}:
            return "it does not know user-defined and unused pieces"
        joined = [score for piece, score in text_scores(proto).items() if len(piece) > 1]
        if len(set(joined)) < len(joined):
            return "pieces of the model have equal scores"
        return Recipe(Segmenter(bpe(proto)).to_str())


class _Tokenizers(Reference):
    def __init__(self, tokenizer: Tokenizer) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__} in batches"
        self._backend: Any = tokenizers.Tokenizer.from_str(tokenizer.backend or "")

    def encode(self, documents: Sequence[bytes]) -> Sequence[ArrayLike]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast([text.decode() for text in documents])]

    def pieces(self) -> list[str]:
        ids = [[id] for id in range(self._backend.get_vocab_size())]
        texts: list[str] = self._backend.decode_batch(ids, skip_special_tokens=False)
        return texts

    def recipe(self) -> Recipe | str:
        settings = json.loads(self._backend.to_str())
        model, added = settings["model"], settings["added_tokens"]
        if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(settings["pre_tokenizer"]):
            return "it does not know the tokenizer's algorithm"
        if model.get("dropout") or any(token["single_word"] for token in added):
            return "it does not know dropout and tokens that stand only alone"
        if settings["normalizer"] and any(token["normalized"] for token in added):
            return "it does not normalise added tokens"
        inner = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a").ids
        starts = [start for start in range(len(whole)) if whole[start : start + len(inner)] == inner]
        if len(starts) != 1:
            return "the special tokens around a text cannot be told from it"
        end = starts[0] + len(inner)
        return Recipe(json.dumps({**settings, "post_processor": None}), tuple(whole[: starts[0]]), tuple(whole[end:]))


class _Megatron(Reference):
    name = "Megatron's tokenizer, a document at a time"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._kind = tokenizer.options.tokenizer_type
        self._tokenize = build_megatron(tokenizer.options).tokenize

    def encode(self, documents: Sequence[bytes]) -> Sequence[ArrayLike]:
        ids = []
        for index, document in enumerate(documents):
            try:
                ids.append(self._tokenize(document.decode()))
            except Exception as error:
                hint = "; it reads numbers, as in '17 4 8'" if self._kind in NULL_TYPES else ""
                reason = f"cannot be encoded by {self._kind}: {last_line(error)[:200]}{hint}"
                raise DocumentError(index, reason) from error
        return ids
