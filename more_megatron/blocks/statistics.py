"""How a repeated router routes, for each step of the iteration.

Three figures: the entropy of the routing distribution in nats (log of the number of experts if it is uniform); the
coefficient of variation of the load (0 if all experts receive the same number of tokens); and, where whole layers are
repeated, the share of tokens that go to other experts than in the step before. They go to TensorBoard and Weights &
Biases as `router entropy/step N`, `expert load cv/step N` and `expert change/step N`, averaged over layers and ranks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from more_megatron.monitoring.figures import write_scalars

__all__ = ["IterationTracker", "record_loss", "record_routing", "routing_entropy"]

_FIGURES = ("router entropy", "expert load cv", "expert change")


def routing_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each routing distribution in nats, in float32, given [..., experts]."""
    # Without the check of its argument, for which a GPU would have to be waited for.
    return torch.distributions.Categorical(logits=logits.float(), validate_args=False).entropy()


@torch.no_grad()
def record_routing(
    step: int, logits: torch.Tensor, routing_map: torch.Tensor, former_map: torch.Tensor | None = None
) -> None:
    """Record one routing decision, if an `IterationTracker` is in place.

    Args:
        step: Number of the step of the iteration, from 0.
        logits: [s, b, experts].
        routing_map: True where a token goes to an expert, [tokens, experts].
        former_map: The same of the step before; None if there is none.
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, IterationTracker):
        return
    entropy = routing_entropy(logits).mean()
    load = routing_map.sum(dim=0).float()
    variation = load.std(correction=0) / load.mean().clamp(min=1e-9)
    figures = [entropy, variation]
    if former_map is not None:
        figures.append((routing_map != former_map).any(dim=-1).float().mean())
    tracker.record_step(step, torch.stack(figures))


def record_loss(name: str, loss: torch.Tensor, router: TopKRouter) -> None:
    """Log a loss of an MoE layer, before its coefficient, averaged over ranks, as Megatron logs those of its router."""
    # Layers of multi-token prediction are numbered after the others.
    layers = router.config.num_layers + (router.config.mtp_num_layers or 0)
    get_moe_metrics_tracker().record(name, loss, router.layer_number, layers, avg_group=router.tp_dp_cp_group)


class IterationTracker(MoEMetricsTracker):
    """Megatron's tracker of MoE metrics, with figures for each step of an iteration.

    Args:
        max_steps: Largest number of steps that are taken.
        losses: Names of losses that are reported besides those that Megatron's training loop asks for.
    """

    def __init__(self, max_steps: int, losses: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._losses = losses
        self._max_steps = max_steps

    @functools.cached_property
    def _steps(self) -> torch.Tensor:
        """Sums of the figures and how many there are, [2, figures, steps].

        Made when first used: only then a rank has chosen its device.
        """
        return torch.zeros(2, len(_FIGURES), self._max_steps, device=torch.cuda.current_device())

    def record_step(self, step: int, figures: torch.Tensor) -> None:
        """Add the figures of one routing decision, in their order; the last of them may be missing."""
        self._steps[0, : len(figures), step] += figures
        self._steps[1, : len(figures), step] += 1

    def means(self) -> dict[str, torch.Tensor]:
        """Return the mean of each figure on this rank, by step; not a number where nothing was recorded."""
        sums, counts = self._steps
        return dict(zip(_FIGURES, sums / counts, strict=True))

    def report(self, loss_scale: float, iteration: int, *args: Any, **kwargs: Any) -> str:
        """Report as Megatron does, and the figures of the steps to the writers."""
        names = kwargs.get("track_names")
        if names is not None:
            kwargs["track_names"] = [*names, *self._losses]
        self._report_steps(iteration, kwargs.get("writer"), kwargs.get("wandb_writer"))
        return super().report(loss_scale, iteration, *args, **kwargs)

    def _report_steps(self, iteration: int, writer: Any, wandb_writer: Any) -> None:
        if self._max_steps == 0:
            return
        torch.distributed.all_reduce(self._steps, group=parallel_state.get_pipeline_model_parallel_group())
        torch.distributed.all_reduce(
            self._steps, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        )
        by_step = (
            (f"{name}/step {step}", mean)
            for name, means in self.means().items()
            for step, mean in enumerate(means.tolist(), start=1)
        )
        write_scalars({name: mean for name, mean in by_step if not math.isnan(mean)}, iteration, writer, wandb_writer)
        self._steps.zero_()
