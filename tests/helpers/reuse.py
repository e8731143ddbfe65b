"""Several training runs in one world, which costs seconds to start, a run of a tiny model less than that."""

from megatron.training import training

from more_megatron.evaluation.runs import forget_run, read_each_docstring_once
from tests.helpers.training import History, train


def train_all(command_lines: list[str]) -> list[History]:
    """Train once for each command line, one after the other, and return what each run reported on this rank.

    Args:
        command_lines: Flags of each run, separated by blanks.
    """
    read_each_docstring_once()
    # It would read all flags again, to find that it has nothing to do.
    training.ft_integration.setup = lambda: None
    histories = []
    for command_line in command_lines:
        histories.append(train(command_line))
        forget_run()
    return histories
