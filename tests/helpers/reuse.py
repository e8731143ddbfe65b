"""Several training runs in one world: what a run leaves behind in its process, put back before the next.

A world costs seconds to start, a run of a tiny model less than that.
"""

from __future__ import annotations

import functools
import signal

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.training import checkpointing, training
from megatron.training.argument_utils import ArgumentGroupFactory

from more_megatron.monitoring.figures import report_to
from tests.helpers.training import History, train

__all__ = ["forget_run", "read_each_docstring_once", "train_all"]


def train_all(command_lines: list[str]) -> list[History]:
    """Train once for each command line, one after the other, and return what each run reported on this rank.

    Args:
        command_lines: Flags of each run, separated by blanks.
    """
    read_each_docstring_once()
    histories = []
    for command_line in command_lines:
        histories.append(train(command_line))
        forget_run()
    return histories


def forget_run() -> None:
    """Put Megatron's process-wide state back to where it is in a process that has not trained yet.

    The process group of all ranks stays; Megatron takes it over where it finds one.
    """
    training.destroy_global_state()
    destroy_moe_metrics_tracker()
    report_to(None)
    checkpointing._CHECKPOINT_VERSION = None
    checkpointing._LOADED_ITERATION = None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@functools.cache
def read_each_docstring_once() -> None:
    """Keep the flags' help, which is read from the source of 27 classes: a third of a second for each command line."""
    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, object.__new__(ArgumentGroupFactory))
    cached = functools.cache(read)
    ArgumentGroupFactory._get_field_docstrings = lambda self, src_cfg_class: cached(src_cfg_class)
