"""Figures of systems: the same mean under every layout, in the log line and at the writers when a line is due."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training import training

from more_megatron.monitoring.figures import Figures, record_figure, report_to
from more_megatron.training import reporting
from tests.helpers.ranks import run_ranks

_ADVANCED = "advanced iterations"


def _means_of_ranks() -> dict[str, float]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    figures = Figures(("steps", "of one rank", "of none"))
    figures.add("steps", torch.tensor([[1.0, 2.0], [3.0, 6.0]])[rank])
    if rank == 1:
        figures.add("of one rank", torch.tensor([4.0, 6.0], requires_grad=True))
    means = figures.means()
    assert figures.means() == means
    figures.clear()
    assert figures.means() == {}
    return means


def test_means_are_over_the_values_of_all_ranks() -> None:
    for means in run_ranks(2, _means_of_ranks):
        assert means == pytest.approx({"steps": 3.0, "of one rank": 5.0})


class _Writer:
    """A stand-in for the writers of TensorBoard and Weights & Biases."""

    def __init__(self) -> None:
        self.written: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        """Write as TensorBoard does."""
        self.written.setdefault(iteration, {})[name] = value

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Write as Weights & Biases does."""
        self.written.setdefault(iteration, {}).update(values)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[_Writer, _Writer]]:
    """Report to stand-ins, a line every two steps."""
    board, wandb = _Writer(), _Writer()
    monkeypatch.setattr(reporting, "get_args", lambda: SimpleNamespace(log_interval=2))
    monkeypatch.setattr(reporting, "get_tensorboard_writer", lambda: board)
    monkeypatch.setattr(reporting, "get_wandb_writer", lambda: wandb)
    yield board, wandb
    report_to(None)


# A run that goes on at a step whose line is due begins no average that the next line ends.
@pytest.mark.parametrize(("first", "expected"), [(1, {1: 1.0, 2: 1.5, 4: 5.0}), (2, {2: 1.0, 4: 2.5})])
def test_a_line_has_the_mean_of_the_steps_since_the_line_before(
    writers: tuple[_Writer, _Writer], monkeypatch: pytest.MonkeyPatch, first: int, expected: dict[int, float]
) -> None:
    lines = {}

    def megatrons_log(_: Any, sums: dict[str, Any], __: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        sums[_ADVANCED] += int(not args[2])
        if kwargs["is_first_iteration"] or iteration % 2 == 0:
            lines[iteration] = {name: float(value) / sums[_ADVANCED] for name, value in sums.items()}
            if iteration % 2 == 0:  # as `platform/repairs/reports.py` has it
                sums.update(dict.fromkeys(sums, 0))

    monkeypatch.setattr(training, "training_log", megatrons_log)
    reporting.report_figures(("mean steps", "mean steps/first layer"))
    sums: dict[str, Any] = {_ADVANCED: 0}
    for iteration, value in zip(range(first, 5), (1.0, 2.0, 3.0, 7.0), strict=False):
        record_figure("mean steps", torch.tensor([value, value]))
        record_figure("mean steps/first layer", torch.tensor(2 * value))
        # The third step is skipped.
        is_first, is_skipped = iteration == first, iteration == 3
        training.training_log({}, sums, 0.1, iteration, 1.0, True, is_skipped, is_first_iteration=is_first)
    assert {iteration: line["mean steps"] for iteration, line in lines.items()} == expected
    assert all("mean steps/first layer" not in line for line in lines.values())
    for writer in writers:
        assert writer.written == {
            iteration: {"mean steps": mean, "mean steps/first layer": 2 * mean} for iteration, mean in expected.items()
        }


def test_a_figure_that_no_system_names_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="does not name the figure 'depth'"):
        Figures(("steps",)).add("depth", torch.ones(1))


def test_nothing_is_recorded_where_no_run_reports() -> None:
    report_to(None)
    record_figure("steps", torch.ones(1))
