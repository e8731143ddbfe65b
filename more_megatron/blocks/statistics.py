"""How well a repeated router balances the load, for each step of the iteration.

Two figures: the entropy of the routing distribution in nats (log of the number of experts if it is uniform), and the
coefficient of variation of the load (0 if all experts receive the same number of tokens). They go to TensorBoard and
Weights & Biases as `router entropy/step N` and `expert load cv/step N`, averaged over layers and ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

__all__ = ["IterationTracker", "record_loss", "record_routing", "routing_entropy"]

_FIGURES = ("router entropy", "expert load cv")


def routing_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each routing distribution in nats, in float32, given [..., experts]."""
    # Without the check of its argument, for which a GPU would have to be waited for.
    return torch.distributions.Categorical(logits=logits.float(), validate_args=False).entropy()


@torch.no_grad()
def record_routing(router: TopKRouter, step: int, logits: torch.Tensor, routing_map: torch.Tensor) -> None:
    """Record one routing decision, if an `IterationTracker` is in place.

    Args:
        router: The router that decided.
        step: Number of the step of the iteration, from 0.
        logits: [s, b, experts].
        routing_map: True where a token goes to an expert, [tokens, experts].
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, IterationTracker):
        return
    entropy = routing_entropy(logits).mean()
    load = routing_map.sum(dim=0).float()
    variation = load.std(correction=0) / load.mean().clamp(min=1e-9)
    tracker.record_step(step, torch.stack((entropy, variation)))


def record_loss(name: str, loss: torch.Tensor, router: TopKRouter) -> None:
    """Log a loss of an MoE layer, averaged over ranks, as Megatron logs those of its router.

    Args:
        name: Name of the loss.
        loss: Its value on this rank, before its coefficient.
        router: Router of the layer.
    """
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
        """Sums of the figures and, in the last row, how many there are.

        Made when first used: only then a rank has chosen its device.
        """
        return torch.zeros(len(_FIGURES) + 1, self._max_steps, device=torch.cuda.current_device())

    def record_step(self, step: int, figures: torch.Tensor) -> None:
        """Add the figures of one routing decision, [2]."""
        self._steps[:-1, step] += figures
        self._steps[-1, step] += 1

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
        counts = self._steps[-1].clamp(min=1)
        for name, means in zip(_FIGURES, (self._steps[:-1] / counts).tolist(), strict=True):
            for step, (mean, count) in enumerate(zip(means, self._steps[-1].tolist(), strict=True), start=1):
                if count == 0:
                    continue
                if writer:
                    writer.add_scalar(f"{name}/step {step}", mean, iteration)
                if wandb_writer:
                    wandb_writer.log({f"{name}/step {step}": mean}, iteration)
        self._steps.zero_()
