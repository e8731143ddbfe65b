"""The language-modelling loss and what is reported of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from more_megatron.training.evaluation import evaluated_steps

__all__ = ["language_model_loss"]

_SPIKE_FACTOR = 10


def language_model_loss(
    loss_mask: torch.Tensor | None,
    figures: dict[str, float],
    answers: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None,
    losses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses of a micro-batch.

    Args:
        loss_mask: 1 for tokens that count, [b, s]; there on the last pipeline stage, which alone computes losses.
        figures: What else is reported of the micro-batch, by name.
        answers: Returns what is reported of answers, sums and weights by name, given the losses; None reports nothing.
        losses: Cross-entropy of each token in nats, [b, s].

    Returns:
        The sum of the losses, the number of tokens that count, and for each reported value its sum and weight.
    """
    assert loss_mask is not None
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if evaluated_steps() is None:
        _check(loss)
    report = {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}
    for name, value in figures.items():
        # Made on the host and copied there it would wait for the forward pass.
        report[name] = torch.cat([loss.new_full((1,), value), loss.new_ones(1)])
    if answers is not None:
        report |= answers(losses.detach())
    return loss, tokens, report


def _check(loss: torch.Tensor) -> None:
    """Hand the loss to Megatron's checks for NaN, infinity and spikes."""
    args = get_args()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "found NaN in local forward loss calculation", True))
        checks.append((torch.isinf, "found Inf in local forward loss calculation", True))
    machine = get_rerun_state_machine()
    if args.check_for_spiky_loss:
        is_spike = functools.partial(machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss")
        checks.append((is_spike, "Spiky loss", False))
    for rejects, message, fatal in checks:
        machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)
