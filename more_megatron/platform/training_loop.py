"""What stands around functions of Megatron's training loop, which calls them by their names in its module."""

import functools
from collections.abc import Callable
from typing import Any

from megatron.training import training

# The rows of this table are put in place by those who say what stands there, where it is wanted.
SURROUNDED = {
    "evaluate": "it evaluates at one depth, and knows the loss alone",
    "evaluate_and_print_results": "it reports the loss alone",
    "training_log": "it logs no figures but those that Megatron has",
    "train_step": "nobody is asked before and after a step",
    "checkpoint_and_decide_exit": "nobody else can end a run",
    "get_forward_backward_func": "a schedule has one sequence length for the whole run",
    "num_floating_point_operations": "it knows Megatron's architectures only, and no recurrence",
}


def surround(name: str, around: Callable[..., Any]) -> None:
    """Let the training loop call `around(former, ...)` from now on where it calls a function of its module.

    `former` is what has stood there until now; the function is one of `SURROUNDED`.
    """
    assert name in SURROUNDED, name
    setattr(training, name, functools.partial(around, getattr(training, name)))
