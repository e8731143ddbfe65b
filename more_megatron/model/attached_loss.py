"""Losses that are attached to the backward pass where they arise, on whatever pipeline stage that is.

Megatron's way for the losses of its routers. It scales them where a model has experts only, so that a model without
any asks for the scale itself.
"""

import functools

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from more_megatron.config import MoREConfig

# Field of the configuration that Megatron's schedules ask for the scale.
_HOOK = "moe_grad_scale_func"


def attach_mean(
    activation: torch.Tensor, loss: torch.Tensor, *, ranks: int, tokens: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the activation, whose backward pass is one of the loss as well.

    Args:
        activation: Anything that the language-modelling loss depends on.
        loss: A mean over this rank's tokens times its coefficient, a scalar.
        ranks: Number of tensor- and context-parallel ranks between which the tokens of a micro-batch are split.
        tokens: Number of this rank's tokens where the run calculates its loss by token; None where it does not.
    """
    loss = loss / ranks
    if tokens is not None:
        # Megatron divides all gradients by the tokens of the batch: what is a mean already is multiplied by them.
        loss = loss * tokens * ranks
    return MoEAuxLossAutoScaler.apply(activation, loss)


def scale_attached_losses(config: MoREConfig, micro_batches: int) -> None:
    """Scale what is attached as Megatron scales the language-modelling loss of one of so many micro-batches."""
    scale = (getattr(config, _HOOK, None) or functools.partial(_scale, config, 1.0))()
    MoEAuxLossAutoScaler.set_loss_scale(scale if config.calculate_per_token_loss else scale / micro_batches)


def weigh_attached_losses(config: MoREConfig, share: float) -> None:
    """Give attached losses the weight that they have where every token counts; on average only this share does.

    A run that calculates its loss by token divides all gradients by the tokens that count. Attached losses are means
    times all tokens: where few of them count they would weigh many times as much.
    """
    setattr(config, _HOOK, functools.partial(_scale, config, share))


def _scale(config: MoREConfig, share: float) -> torch.Tensor:
    scale = torch.full((1,), share, device=torch.cuda.current_device())
    return scale if config.grad_scale_func is None else config.grad_scale_func(scale)
