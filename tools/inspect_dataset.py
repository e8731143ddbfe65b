#!/usr/bin/env python
"""What is in a Megatron dataset: documents, tokens, lengths, ratios for bits per byte, and a decoded sample."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.check import check_dataset, check_hashes
from more_megatron.data.indexed import IndexFile, bin_path, idx_path, read_index, read_manifest
from more_megatron.data.tokenizers import (
    TokenizerOptions,
    TokenizerType,
    build_megatron,
    is_direct_sentencepiece,
    open_sentencepiece,
    tokenizer_sha256,
)
from more_megatron.errors import MoREError, OneLineParser, one_line_errors

_BAR = 40


def describe(
    prefix: str,
    options: TokenizerOptions | None = None,
    document: int = 0,
    sample_tokens: int = 100,
    hashes: bool = False,
) -> list[str]:
    """Describe a dataset.

    Args:
        prefix: Its prefix.
        options: Tokenizer to decode with; None takes the manifest's if it lies beside the dataset.
        document: The document to show.
        sample_tokens: How much of it to show.
        hashes: Whether the files are read whole and compared with the manifest's hashes.

    Returns:
        Lines to print.

    Raises:
        MoREError: The dataset is missing or damaged, or there is no such document.
    """
    check_dataset(prefix)
    index = read_index(idx_path(prefix))
    manifest = read_manifest(prefix)
    lines = _counts(prefix, index) + _ratios(manifest) + _histogram(index)
    if hashes:
        lines.append(f"files      {check_hashes(prefix)}")
    options = options or _options(prefix, manifest)
    return lines + _sample(prefix, index, options, document, sample_tokens)


def _counts(prefix: str, index: IndexFile) -> list[str]:
    tokens = int(index.lengths.sum(dtype=np.int64))
    size = os.path.getsize(bin_path(prefix))
    empty = int(np.count_nonzero(np.diff(index.documents) == 0))
    lines = [
        f"dataset    {prefix}",
        f"documents  {index.document_count:,}" + (f" ({empty:,} empty)" if empty else ""),
        f"tokens     {tokens:,} ({index.dtype.name}, {size / 1e6:,.1f} MB)",
    ]
    if index.sequence_count != index.document_count - empty:
        lines.append(f"sequences  {index.sequence_count:,}")
    return lines


def _ratios(manifest: dict[str, Any] | None) -> list[str]:
    tokens, size, words = ((manifest or {}).get(name) for name in ("tokens", "text_bytes", "words"))
    if manifest is None or not (tokens and size and words):
        return ["manifest   none: token/byte and word/byte ratios are unknown"]
    tokenizer = {"model": None, "vocab_size": 0, "eod": None, **manifest["tokenizer"]}
    return [
        f"tokenizer  {tokenizer['type']} {tokenizer['model'] or ''}",
        f"ids        {tokenizer['vocab_size']:,}, end of document {tokenizer['eod']}",
        f"text       {size:,} bytes, {words:,} words",
        f"ratios     {tokens / size:.4f} tokens/byte, {words / size:.4f} words/byte, {tokens / words:.4f} tokens/word",
        f"           bits per byte = loss in nats x {tokens / size / math.log(2):.4f}",
    ]


def _histogram(index: IndexFile) -> list[str]:
    """Documents by length, one line for each power of two."""
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.documents]
    lengths = np.diff(ends)
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(bins)
    lines = [
        f"length     mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}, longest {lengths.max():,} tokens"
    ]
    for power in range(int(bins.min()), len(counts)):
        bar = "#" * round(_BAR * counts[power] / counts.max())
        lines.append(f"  <= {2**power:>12,}  {counts[power]:>12,}  {bar}".rstrip())
    return lines


def _options(prefix: str, manifest: dict[str, Any] | None) -> TokenizerOptions | None:
    """The manifest's tokenizer if it lies beside the dataset: a manifest may come from anyone, and name anything.

    It never allows a tokenizer to run code.
    """
    stored = (manifest or {}).get("options", {}).get("tokenizer")
    if not isinstance(stored, dict) or not isinstance(stored.get("tokenizer_model"), str):
        return None
    kind, model = str(stored.get("tokenizer_type")), stored["tokenizer_model"]
    folder = os.path.dirname(os.path.realpath(prefix))
    if not os.path.exists(model) or os.path.commonpath([os.path.realpath(model), folder]) != folder:
        return None
    known = {name for name in TokenizerOptions.__dataclass_fields__ if name.startswith("tokenizer_")}
    flags: dict[str, Any] = {name: True for name, value in stored.items() if value is True and name in known}
    options = TokenizerOptions(kind, model, **flags)
    assert manifest is not None
    return options if tokenizer_sha256(options) == manifest["tokenizer"].get("sha256") else None


def _sample(
    prefix: str, index: IndexFile, options: TokenizerOptions | None, document: int, sample_tokens: int
) -> list[str]:
    if not 0 <= document < index.document_count or sample_tokens < 1:
        raise MoREError(f"--document must be from 0 to {index.document_count - 1}, --sample-tokens at least 1")
    first, last = index.documents[document], index.documents[document + 1]
    count = int(index.lengths[first:last].sum(dtype=np.int64)) if last > first else 0
    header = f"document   {document}: {count:,} tokens"
    if not count:
        return [header]
    tokens: NDArray[np.generic] = np.fromfile(
        bin_path(prefix), index.dtype, min(count, sample_tokens), offset=int(index.pointers[first])
    )
    ids: list[int] = [int(id) for id in tokens]
    if options is None:
        return [header, f"  ids {ids}", "  give --tokenizer-type and --tokenizer-model to see the text"]
    return [header, *(f"  {line}" for line in decode(options, ids).splitlines())]


def decode(options: TokenizerOptions, ids: list[int]) -> str:
    """Return the text of token ids."""
    if is_direct_sentencepiece(options) and options.tokenizer_model:
        return str(open_sentencepiece(options).decode(ids))
    return str(build_megatron(options).detokenize(ids))


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("prefix", help="prefix of the dataset, without .bin or .idx")
    parser.add_argument("--document", type=int, default=0, help="document to show (default: the first)")
    parser.add_argument("--sample-tokens", type=int, default=100, help="how much of it to show (default: 100)")
    types = [kind.value for kind in TokenizerType]
    parser.add_argument("--check", action="store_true", help="read the files whole and compare them with their hashes")
    parser.add_argument("--tokenizer-type", choices=types, metavar="T", help="type of --tokenizer-model")
    parser.add_argument(
        "--tokenizer-model",
        metavar="M",
        help="to show text with; without it only a tokenizer beside the dataset is used",
    )
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run code of its own")
    args = parser.parse_args(arguments)
    with one_line_errors(Path(__file__).name):
        options = None
        if args.tokenizer_type or args.tokenizer_model:
            args.tokenizer_type = args.tokenizer_type or TokenizerType.SENTENCEPIECE
            options = TokenizerOptions.from_args(args)
        for line in describe(args.prefix, options, args.document, args.sample_tokens, args.check):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
