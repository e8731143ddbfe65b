"""What was written, read again and compared with where it came from."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import CheckpointException

from more_megatron.errors import MoREError, last_line
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.safetensors_files import SafetensorsFolder, sha256
from more_megatron.hf.mapping import Entry
from more_megatron.progress import progress_bar

_TOKENS = 64
_TOLERANCE = 1e-4
# Copies of the weights in float32: one of each side, and one while a side is loaded.
_COPIES = 3


def compare_tensors(
    folder: Path, entries: Sequence[Entry], read: Callable[[Entry], torch.Tensor], progress: bool
) -> str:
    """Compare the SHA-256 of every tensor in both layouts, and return what was compared, in words.

    `read` returns a parameter of Megatron's side.

    Raises:
        MoREError: If two tensors differ.
    """
    files = SafetensorsFolder(folder)
    with progress_bar(len(entries), "parameter", "verify", progress) as bar:
        for entry in entries:
            ours = read(entry)
            expected = dict(zip(entry.names, entry.split(ours), strict=True))
            theirs = {name: files.tensor(name).to(ours.dtype) for name in files.names(entry)}
            for name, found in theirs.items():
                if sha256(expected[name]) != sha256(found):
                    raise MoREError(f"what was written cannot be trusted: {name} differs from its source")
            if sha256(entry.merge(list(theirs.values()))) != sha256(ours):
                raise MoREError(f"what was written cannot be trusted: {entry.key} does not come back the same")
            bar.update()
    return f"verified: {len(entries)} parameters have the same hashes on both sides, in both layouts"


def compare_logits(
    folder: Path, checkpoint: MegatronCheckpoint, entries: Sequence[Entry], dtype: torch.dtype | None
) -> str:
    """Compare the logits of both sides on some tokens, in float32 on the CPU, where this machine can hold both.

    Return how far they are apart, or why they were not compared. `dtype` is what the weights were rounded to on their
    way; None: they were not.

    Raises:
        MoREError: If they differ.
    """
    import psutil

    needed = 4 * _COPIES * sum(prod(entry.shape) for entry in entries)
    available = psutil.virtual_memory().available
    if needed > available:
        return f"logits not compared: both sides take {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
    args = checkpoint.args
    positions = torch.arange(min(_TOKENS, args.max_position_embeddings))
    tokens = ((7 * positions + 3) % (getattr(args, "vocab_size", None) or args.padded_vocab_size)).unsqueeze(0)
    with _quiet():
        os.environ.setdefault("MORE_PLATFORM", "cpu")
        from more_megatron.hf.conversion.megatron_model import megatron_logits

        try:
            ours = megatron_logits(checkpoint, tokens, dtype)
        except (Exception, CheckpointException) as error:  # whatever Megatron meets in a checkpoint from elsewhere
            raise MoREError(f"checkpoint {checkpoint.path} cannot be loaded by Megatron: {last_line(error)}") from error
        if isinstance(ours, str):
            return f"logits not compared: {ours}"
        theirs = _huggingface_logits(folder, tokens)
    difference = (ours - theirs).abs().max().item()
    bound = _TOLERANCE * max(1.0, ours.abs().max().item())
    if not difference <= bound:
        raise MoREError(f"what was written cannot be trusted: logits differ by {difference:.2g} from Megatron's")
    return f"verified: logits of {tokens.numel()} tokens differ from Megatron's by {difference:.1g} at most"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Megatron says while it builds a model out of the way."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def _huggingface_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers.utils.logging import disable_progress_bar

    from more_megatron.hf.exported.modeling_more import MoREForCausalLM

    disable_progress_bar()
    model = MoREForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens).logits
