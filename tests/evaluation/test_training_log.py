"""Reading Megatron's lines, also where ranks write into each other's."""

import math

from more_megatron.evaluation.training_log import read_iteration, read_log, read_validation

_FIRST = (
    " [2026-01-01 00:00:00.000000] iteration        1/     120 | consumed samples:            8 | "
    "elapsed time per iteration (ms): 1061.0 | learning rate: 3.3E-04 | global batch size:     8 | "
    "lm loss: 8.330000E+00 | recurrence steps: 3.000000E+00 | grad norm: 1.1 |"
)
_SECOND = (
    " [2026-01-01 00:00:04.000000] iteration       10/     120 | consumed samples:           80 | "
    "elapsed time per iteration (ms): 500.0 | learning rate: 2.0E-03 | global batch size:     8 | "
    "grad norm: 1.1 | number of skipped iterations:   9 |"
)
_VALIDATION = (
    " validation loss at iteration 120 on validation set | lm loss value: 5.5E+00 | lm loss PPL: 2.446919E+02 | "
)
_TEST = _VALIDATION.replace("validation", "test").replace("5.5E", "9.5E")
_OLD_TEST = _VALIDATION.replace("on validation set", "on test set").replace("5.5E", "9.5E")


def test_iteration_line() -> None:
    iteration = read_iteration(_FIRST)
    assert (iteration.number, iteration.total, iteration.sequences) == (1, 120, 8)
    assert (iteration.loss, iteration.milliseconds, iteration.recurrence_steps) == (8.33, 1061.0, 3.0)


def test_iteration_line_without_loss_and_recurrence() -> None:
    iteration = read_iteration(_SECOND)
    assert math.isnan(iteration.loss)
    assert iteration.recurrence_steps is None


def test_lines_that_begin_inside_another_and_lines_of_others() -> None:
    assert read_iteration("Number of parameters in billions:  0.00" + _FIRST).number == 1
    assert read_validation(_FIRST) is None
    assert read_iteration("iteration 5/10 | nothing of it") is None


def test_whole_log() -> None:
    log = read_log(["> platform: cpu\n", _FIRST, _SECOND, "----", _VALIDATION, "----", _TEST, _OLD_TEST])
    assert [iteration.number for iteration in log.iterations] == [1, 10]
    assert (log.validations[-1].iteration, log.validations[-1].loss) == (120, 5.5)
