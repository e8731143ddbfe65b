"""Validation losses by depth, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["observe_validation", "tell_validation"]

# Training steps taken, and the loss in nats by recurrence steps.
Observer = Callable[[int, dict[int, float]], None]

_observers: list[Observer] = []


def observe_validation(observer: Observer) -> None:
    """Call a function after each validation at `--recurrence-eval-depths`, on ranks of the last pipeline stage."""
    _observers.append(observer)


def tell_validation(iteration: int, losses: dict[int, float]) -> None:
    """Tell all observers of the losses of a validation."""
    for observer in _observers:
        observer(iteration, losses)
