"""What the server process imports before it forks ranks."""

import argparse
import gc

from more_megatron.platform import initialize_platform

initialize_platform()

# What a run imports when it asks for a tokenizer, and when an optimizer takes its first step.
import megatron.core.tokenizers.text.text_tokenizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from more_megatron.evaluation.runs import read_each_docstring_once  # noqa: E402

# Every rank reads flags.
read_each_docstring_once()
add_megatron_arguments(argparse.ArgumentParser())

# What is here now stays: no rank need look at it again, nor copy the pages that a look would write to.
gc.collect()
gc.freeze()
