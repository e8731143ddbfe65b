"""Evaluation at several depths, on the same samples, and of answers by task.

Megatron's evaluation runs once for each depth. The first is its own, at `--recurrence-eval-steps`, and is reported as
Megatron does; what it read is read again for the others.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, print_rank_last

from more_megatron.config import MoREConfig
from more_megatron.monitoring.figures import write_scalars
from more_megatron.monitoring.loss import record_depth_losses
from more_megatron.platform.training_loop import surround
from more_megatron.systems import get_system

LOSS = "lm loss"

_steps: int | None = None


def evaluated_steps() -> int | None:
    """Return the recurrence steps of the evaluation under way; None: those of the configuration.

    At others a model may well end in numbers that are not finite, which is a result there and no reason to end a run.
    """
    return _steps


def evaluate_at_depths(config: MoREConfig) -> None:
    """Let Megatron's training loop evaluate at the depths of the configuration, and report answers by task."""
    evaluation = DepthEvaluation(config)
    surround("evaluate_and_print_results", evaluation.report)
    surround("evaluate", evaluation.evaluate)


class DepthEvaluation:
    """Takes the place of two functions of Megatron's training loop, of which the one calls the other."""

    def __init__(self, config: MoREConfig) -> None:
        self._own = config.evaluation_steps
        self._depths = config.recurrence_eval_depths or []
        self._is_recurrent = get_system(config.more_variant).recurrent
        # For each validation set its results at each depth.
        self._results: list[dict[int, dict[str, float]]] = []

    def evaluate(self, evaluate: Callable[..., Any], forward_step: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Megatron's `evaluate`, whose arguments these are, at one depth after the other."""
        global _steps
        consumed, results = get_args().consumed_valid_samples, {}
        parts = data if isinstance(data, list) else [data]
        kept = [None if part is None else _kept(part) for part in parts]
        own: Any = None
        for steps in dict.fromkeys((self._own, *self._depths)):
            get_args().consumed_valid_samples = consumed
            _steps = None if steps == self._own else steps
            again = [copy.copy(part) for part in kept]
            try:
                read = again if isinstance(data, list) else again[0]
                losses, other, is_over = evaluate(forward_step, read, *args, **kwargs)
            finally:
                _steps = None
            if is_over:
                return losses, other, is_over
            results[steps] = {name: float(loss) for name, loss in losses.items()}
            if own is None:
                own = {name: loss for name, loss in losses.items() if name == LOSS}, other, is_over
        self._results.append(results)
        return own

    def report(self, evaluate_and_print: Callable[..., None], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Evaluate and report as Megatron's `evaluate_and_print_results`, and what it does not know of besides."""
        self._results = []
        evaluate_and_print(prefix, *args, **kwargs)
        iteration, is_test = args[3], prefix.endswith("test set")
        for number, results in enumerate(self._results):
            names = get_args().validation_set_names
            is_one_of_many = get_args().multiple_validation_sets and not is_test
            suffix = f"-{names[number] if names else number}" if is_one_of_many else ""
            for steps, values in results.items():
                self._print(f"{prefix}{suffix}", steps, values)
                if not is_test and kwargs.get("write_to_tensorboard", True):
                    _write(suffix, steps, values, iteration, steps in self._depths)
            losses = {steps: values[LOSS] for steps, values in results.items() if LOSS in values}
            if not is_test and number == 0 and self._depths and losses:
                record_depth_losses(losses)

    def _print(self, prefix: str, steps: int, values: dict[str, float]) -> None:
        depth = f" with {steps} recurrence steps" if self._is_recurrent else ""
        figures = [f"{name}: {value:.6E}" for name, value in values.items() if name == LOSS and steps in self._depths]
        figures += [f"{name}: {value:.4f}" for name, value in values.items() if name != LOSS and not math.isnan(value)]
        if figures:
            print_rank_last(f" evaluation at {prefix}{depth} | {' | '.join(figures)} |")


def _kept(data: Any) -> Any:
    """Return an iterator each copy of which begins here: what one of them has read is kept for the others."""
    # Megatron's iterators have no `__iter__`, and never yield None.
    return itertools.tee(iter(data.__next__, None), 1)[0]


def _write(suffix: str, steps: int, values: dict[str, float], iteration: int, is_asked: bool) -> None:
    series = {f"{name}{suffix}/r{steps}": value for name, value in values.items() if name != LOSS}
    if is_asked and LOSS in values:
        series[f"val_loss_r{steps}{suffix}"] = values[LOSS]
    known = {name: value for name, value in series.items() if not math.isnan(value)}
    write_scalars(known, iteration, get_tensorboard_writer(), get_wandb_writer())
