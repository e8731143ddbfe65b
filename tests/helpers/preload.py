"""What the server process imports before it forks ranks."""

import gc

from more_megatron.platform import initialize_platform

initialize_platform()

# Megatron imports its tokenizers, and with them transformers, when a run asks for one.
import megatron.core.tokenizers.text.text_tokenizer  # noqa: E402, F401

import tests.helpers.reuse  # noqa: E402, F401

# What is here now stays: no rank need look at it again, nor copy the pages that a look would write to.
gc.collect()
gc.freeze()
