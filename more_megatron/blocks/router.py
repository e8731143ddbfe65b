"""A router that one layer asks several times in one forward pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

from more_megatron.blocks.statistics import is_routing_reported, record_loss, record_routing, routing_entropy
from more_megatron.config import MoREConfig
from more_megatron.model.attached_loss import attach_mean
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch, Pass


@dataclass
class RouterCall:
    """One call of the router: in which pass, and what it leaves for later ones with its gradient.

    That are the logits that routed, [s, b, experts], where the next pass averages with them; of a router that balances
    over a sequence the distributions summed over positions, [b, experts]; else None.
    """

    current: Pass
    former: torch.Tensor | None = None  # what it left in the pass before
    carried: torch.Tensor | None = None  # what it leaves in this one


# Of a call by itself.
_ALONE = Pass(MicroBatch(Depth(0, 1)), 0, former={}, left={}, in_graph=True)


class IteratedRouter(TopKRouter):
    """Megatron's router for a layer that calls it r times, b of them with gradient.

    Losses are averaged over the b calls, not summed: the coefficients mean the same at any depth. The logits can be a
    moving average over the steps (`router_logit_ema`), and a routing distribution that is too sure of itself can be
    penalised (`router_min_entropy`). Every step is counted, those without gradient too.
    """

    config: MoREConfig
    _call = RouterCall(_ALONE)

    @contextlib.contextmanager
    def at(self, current: Pass, former: torch.Tensor | None = None) -> Iterator[RouterCall]:
        """Make a call inside the block one of this pass, given what the router left in the pass before.

        It lasts for one synchronous call, and recomputation enters the block again: nothing outlives it.
        """
        self._call = RouterCall(current, former)
        try:
            yield self._call
        finally:
            self._call = RouterCall(_ALONE)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits that decide the routing of this pass, [s, b, experts].

        With weight beta: l_t = beta l_{t-1} + (1 - beta) W s_t, and l_0 = W s_0.
        """
        logits = super().gating(input)
        former, beta = self._call.former, self.config.router_logit_ema
        if beta > 0.0 and former is not None:
            logits = beta * former + (1.0 - beta) * logits
        self._call.carried = logits if beta > 0.0 else None
        return logits

    @property
    def recurrence_step(self) -> int:
        """Number of the step under way, from 0."""
        return self._call.current.index

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """Route as Megatron does, with the entropy penalty and the statistics of the pass."""
        logits = self._apply_entropy_floor(logits, padding_mask)
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        current, key = self._call.current, (self.layer_number, "map")
        if self.training and current.is_counted() and is_routing_reported(current.index):
            former_map = current.former.get(key)
            changed = None if former_map is None else (routing_map != former_map).any(dim=-1)
            record_routing(current.index, logits, routing_map.sum(dim=0), changed)
        current.leave(key, routing_map)
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Attach a balance loss as Megatron does, weighted."""
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss * self._call.current.loss_weight, *args, **kwargs
        )

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss (ST-MoE, arXiv 2202.08906), weighted.

        Megatron's method has no place for a weight: it reads the coefficient from the configuration.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or self._call.current.loss_weight == 1.0 or not self._attaches_losses:
            return super().apply_z_loss(logits, padding_mask=padding_mask)
        return self._attach(logits, z_loss_func(logits, 1.0, padding_mask), coefficient, "z_loss", padding_mask)

    def _apply_entropy_floor(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        floor, coefficient = self.config.router_min_entropy, self.config.router_min_entropy_coeff
        if floor == 0.0 or coefficient == 0.0 or not self._attaches_losses:
            return logits
        shortfall = torch.relu(floor - routing_entropy(logits))
        if padding_mask is not None:
            valid = ~padding_mask.view_as(shortfall)
            penalty = (shortfall * valid).sum() / valid.sum().clamp(min=1)
        else:
            penalty = shortfall.mean()
        return self._attach(logits, penalty, coefficient, "entropy_loss", padding_mask)

    @property
    def _attaches_losses(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _attach(
        self, activation: torch.Tensor, loss: torch.Tensor, coefficient: float, name: str, padding_mask: Any
    ) -> torch.Tensor:
        """Attach a mean over this rank's tokens to the backward pass, and log it: the way of Megatron's z-loss."""
        loss = loss * self._call.current.loss_weight
        record_loss(name, loss, self.config, self.layer_number, self.tp_dp_cp_group)
        rows = activation.numel() // activation.size(-1) if padding_mask is None else (~padding_mask).sum()
        tokens = rows if self.calculate_per_token_loss else None
        return attach_mean(activation, loss * coefficient, ranks=self.tp_cp_group.size(), tokens=tokens)

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of each expert for the update of its bias, in every step once."""
        if not (self.enable_expert_bias and self.training and self._call.current.is_counted()):
            return
        with torch.no_grad():
            valid = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += valid.sum(dim=0)
