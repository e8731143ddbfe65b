"""Training a SentencePiece BPE tokenizer on the documents that are about to be encoded."""

import io
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from more_megatron.data.output import writing
from more_megatron.data.reading import read_all_documents
from more_megatron.data.sources import Source
from more_megatron.errors import MoREError
from more_megatron.unfinished import unfinished_file

_SAMPLE_BYTES = 1 << 27
_LONGEST_SENTENCE = 4096


def train_sentencepiece(sources: Sequence[Source], vocab_size: int, path: str) -> None:
    """Train BPE with byte fallback and write the model when it is complete.

    The model keeps every character: it neither normalises nor collapses spaces, so a decoded text is the text. Inputs
    above 128 MiB are sampled evenly.

    Raises:
        MoREError: There is too little text for this vocabulary, or the file cannot be written.
    """
    import sentencepiece

    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sources),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _LONGEST_SENTENCE,
            num_threads=min(16, os.cpu_count() or 1),
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise MoREError(_reason(str(error), vocab_size)) from error
    with writing(target), unfinished_file(target) as file:
        file.write_bytes(model.getvalue())


def _sentences(sources: Sequence[Source]) -> Iterator[str]:
    stride = max(1, -(-sum(source.size for source in sources) // _SAMPLE_BYTES))
    for document in islice(read_all_documents(sources), 0, None, stride):
        for line in document.decode().replace("\0", "").split("\n"):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                piece = line[start : start + _LONGEST_SENTENCE]
                if not piece.isspace():
                    yield piece


def _reason(message: str, vocab_size: int) -> str:
    most = re.search(r"Vocabulary size too high.*?<= ?(\d+)", message)
    if most:
        return f"--vocab-size {vocab_size} is too large for this text; use {most.group(1)} or less"
    least = re.search(r"smaller than required_chars\. ?\d+ vs (\d+)", message)
    if least:
        return f"--vocab-size {vocab_size} is too small for this text's characters; use more than {least.group(1)}"
    if "sentences_.empty" in message or "empty" in message:
        return "there is no text to train a tokenizer on"
    return f"the tokenizer cannot be trained: {' '.join(message.split())[:300]}"
