#!/usr/bin/env python
"""What is in a Megatron dataset: documents, tokens, lengths, ratios for bits per byte, and a decoded sample."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.inspect import describe
from more_megatron.data.tokenizers import TokenizerOptions, TokenizerType
from more_megatron.errors import one_line_errors


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    with one_line_errors(Path(__file__).name, OSError):
        options = None
        if args.tokenizer_type or args.tokenizer_model:
            kind = args.tokenizer_type or TokenizerType.SENTENCEPIECE
            options = TokenizerOptions(
                kind, args.tokenizer_model, args.vocab_size, trust_remote_code=args.trust_remote_code
            )
        for line in describe(args.prefix, options, args.document, args.sample_tokens, args.check):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
