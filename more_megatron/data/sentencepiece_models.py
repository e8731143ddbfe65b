"""What is in a SentencePiece model, and its BPE as the library `tokenizers` has it."""

import os
from pathlib import Path
from typing import Any


def read_model(path: str | os.PathLike[str]) -> Any:
    """Return the content of a model, a `ModelProto`."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(Path(path).read_bytes())
    return proto


def text_scores(proto: Any) -> dict[str, float]:
    """Return the scores of the pieces that texts are made of."""
    kinds = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED)
    return {piece.piece: piece.score for piece in proto.pieces if piece.type in kinds}


def unknown_piece(proto: Any) -> str | None:
    """Return the piece that stands for what no other has; None if there is none."""
    return next((piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.UNKNOWN), None)


def bpe(proto: Any) -> Any:
    """Return the segmentation of a BPE model as a model of `tokenizers`.

    Merges are the pairs of pieces that make a piece, the best piece first: SentencePiece takes the best piece that two
    neighbours make, the leftmost first. Where several pairs make the same piece, as in a run of one character, the pair
    with the longer left half is the leftmost.
    """
    from tokenizers import models

    scores = text_scores(proto)
    halves = ((score, end, piece[:end], piece[end:]) for piece, score in scores.items() for end in range(1, len(piece)))
    merges = [(-score, -end, left, right) for score, end, left, right in halves if left in scores and right in scores]
    return models.BPE(
        {piece.piece: index for index, piece in enumerate(proto.pieces)},
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=unknown_piece(proto),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
