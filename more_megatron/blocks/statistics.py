"""How repeated routers route in each step, and losses of MoE layers besides those that Megatron logs.

Three figures: the entropy of the routing distribution in nats (log of the number of experts if it is uniform); the
coefficient of variation of the load (0 if all experts receive the same number of tokens); and, where whole layers are
repeated, the share of tokens that go to other experts than in the step before. They are called `router entropy/step N`,
`expert load cv/step N` and `expert change/step N`, with the kind of router in front where a layer has several.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker

from more_megatron.config import MoREConfig
from more_megatron.monitoring.figures import is_reported, record_figure

_ENTROPY, _LOAD, _CHANGE = "router entropy", "expert load cv", "expert change"


def router_figures(max_steps: int, kinds: tuple[str, ...] = ("",)) -> tuple[str, ...]:
    """Return the names of the figures of routers that are asked in every step, in so many steps."""
    names = [f"{kind}{figure}" for kind in kinds for figure in (_ENTROPY, _LOAD)]
    return tuple(f"{name}/step {step}" for name in (*names, _CHANGE) for step in range(1, max_steps + 1))


def routing_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each routing distribution in nats, in float32, given [..., experts]."""
    # Without the check of its argument, for which a GPU would have to be waited for.
    return torch.distributions.Categorical(logits=logits.float(), validate_args=False).entropy()


def is_routing_reported(step: int) -> bool:
    """Return whether a run reports the decisions of a step, from 0."""
    return is_reported(f"{_ENTROPY}/step {step + 1}")


@torch.no_grad()
def record_routing(
    step: int, logits: torch.Tensor, loads: torch.Tensor, changed: torch.Tensor | None = None, *, kind: str = ""
) -> None:
    """Record the decisions of a step.

    Args:
        step: Number of the step of the iteration, from 0.
        logits: [..., experts].
        loads: How often each expert was chosen, [experts], or [heads, experts] where each head has its own.
        changed: Whether each token goes to other experts than in the step before; None if that is not known.
        kind: Kind of router. What a watched step sees of an MoE layer's is in `more_megatron.monitoring.routing`.
    """
    loads = loads.float()
    figures = {
        f"{kind}{_ENTROPY}": routing_entropy(logits),
        f"{kind}{_LOAD}": loads.std(-1, correction=0) / loads.mean(-1).clamp(min=1e-9),
    }
    if changed is not None:
        figures[_CHANGE] = changed
    for name, values in figures.items():
        record_figure(f"{name}/step {step + 1}", values, is_watched=bool(kind))


def record_loss(
    name: str, loss: torch.Tensor, config: MoREConfig, layer_number: int | None, ranks: torch.distributed.ProcessGroup
) -> None:
    """Log a loss of an MoE layer, before its coefficient, averaged over ranks, as Megatron logs those of its router."""
    # Layers of multi-token prediction are numbered after the others.
    layers = config.num_layers + (config.mtp_num_layers or 0)
    get_moe_metrics_tracker().record(name, loss, layer_number, layers, avg_group=ranks)


class LossTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics; `losses` are reported besides those that its training loop asks for."""

    def __init__(self, losses: tuple[str, ...]) -> None:
        super().__init__()
        self._losses = losses

    def report(self, *args: Any, **kwargs: Any) -> str:
        """Report as Megatron does."""
        kwargs["track_names"] = [*kwargs["track_names"], *self._losses]
        return super().report(*args, **kwargs)
