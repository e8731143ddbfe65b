"""A router that one layer asks several times in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

__all__ = ["IteratedRouter"]


class IteratedRouter(TopKRouter):
    """Megatron's router with losses that are averaged over the calls of one forward pass, not summed.

    Megatron attaches the balance loss and the z-loss to every call of the router. A layer that calls its router b times
    with gradient weights each call by 1/b, so that the coefficients mean the same at any depth.
    """

    _loss_weight = 1.0

    @contextlib.contextmanager
    def weighted_losses(self, weight: float) -> Iterator[None]:
        """Multiply the losses of calls inside the block by `weight`.

        The weight lasts for one synchronous call, recomputation enters the block again: nothing outlives it.
        """
        self._loss_weight = weight
        try:
            yield
        finally:
            self._loss_weight = 1.0

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Attach a balance loss as Megatron does, weighted."""
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss * self._loss_weight, *args, **kwargs
        )

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss (ST-MoE, arXiv 2202.08906), weighted.

        Megatron's method has no place for a weight: the coefficient is read from the configuration inside it.

        Args:
            logits: Router logits, [tokens, experts].
            padding_mask: True for padding tokens, [tokens].
        """
        coefficient = self.config.moe_z_loss_coeff
        if self._loss_weight == 1.0 or coefficient is None or not (self.training and torch.is_grad_enabled()):
            return super().apply_z_loss(logits, padding_mask=padding_mask)
        group_size = self.tp_cp_group.size()
        z_loss = z_loss_func(logits, coefficient / group_size, padding_mask=padding_mask) * self._loss_weight
        get_moe_metrics_tracker().record(
            "z_loss",
            z_loss / (coefficient / group_size),
            self.layer_number,
            self.config.num_layers,
            avg_group=self.tp_dp_cp_group,
        )
        if self.calculate_per_token_loss:
            tokens = (~padding_mask).sum() if padding_mask is not None else logits.shape[0]
            z_loss = z_loss * tokens * group_size
        return MoEAuxLossAutoScaler.apply(logits, z_loss)
