"""Norms of gradients by kind of parameter and by expert, as the optimizer is about to see them, before clipping.

The squares of all kinds add up to the square of the gradient norm in Megatron's log line.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from more_megatron.monitoring.watch import Key, Watch

_CONCERN = "gradient"
_BY_EXPERT = "experts"


@dataclass(frozen=True)
class Owner:
    """Whom a parameter belongs to."""

    kind: str  # kind of parameter: "attention", "router", "experts"
    place: str = ""  # its layer, "layer 3"; empty outside of layers
    # Global numbers of the experts whose weights it holds, one after the other; empty if of none
    experts: Sequence[int] = ()
    num_experts: int = 0  # experts of the layer


@torch.no_grad()
def record_gradients(watch: Watch, chunks: Iterable[Any], owners: Mapping[torch.nn.Parameter, Owner]) -> None:
    """Record the squares of all gradients that this rank alone holds, or its share of those that others hold, too.

    Chunks are in Megatron's wrapper, their gradients reduced.
    """
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            for parameter, gradient, start, share in _own_gradients(group):
                if parameter in owners:
                    _record(watch, owners[parameter], parameter.numel(), gradient, start, share)


def _own_gradients(group: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, float]]:
    """Yield for each parameter the part of its gradient that is reduced here, where it starts, and how much it counts.

    The distributed optimizer leaves each data-parallel rank a part of every bucket; the remainder is not reduced. Ranks
    of one stage are to record the same keys: where none of a gradient is theirs, the part is empty. The copy that the
    last stage has of tied embeddings is counted where they are.
    """
    is_sharded = group.ddp_config.use_distributed_optimizer
    replicas = group.ddp_config.num_distributed_optimizer_instances if is_sharded else group.data_parallel_group.size()
    ranks = group.intra_distributed_optimizer_instance_size if is_sharded else 1
    rank = group.intra_distributed_optimizer_instance_rank if is_sharded else 0
    expert_ranks = parallel_state.get_expert_tensor_parallel_group()
    for bucket in group.buckets:
        size = bucket.grad_data.numel() // ranks
        for parameter, (first, last) in bucket.param_to_index.items():
            if param_is_not_shared(parameter):
                is_own = param_is_not_tensor_parallel_duplicate(parameter, expert_tp_group=expert_ranks)
                start = max(first, rank * size)
                end = max(start, min(last, (rank + 1) * size)) if is_own else start
                yield parameter, bucket.grad_data[start:end], start - first, 1.0 / replicas


def _record(watch: Watch, owner: Owner, size: int, gradient: torch.Tensor, start: int, share: float) -> None:
    watch.add(Key(_CONCERN, owner.kind), share * gradient.double().square().sum())
    if not owner.experts:
        return
    squares = torch.zeros(owner.num_experts, dtype=torch.float64, device=gradient.device)
    width = size // len(owner.experts)
    for index, expert in enumerate(owner.experts):
        part = gradient[max(index * width - start, 0) : max((index + 1) * width - start, 0)]
        squares[expert] += share * part.double().square().sum()
    watch.add(Key(_CONCERN, _BY_EXPERT, owner.place), squares)


def gradient_figures(sums: dict[Key, np.ndarray], loss_scale: float) -> Iterator[tuple[Key, float]]:
    """Yield the norm of each kind of parameter, given the sums over all ranks and the factor on the loss."""
    for key, squares in sums.items():
        if key.concern == _CONCERN and not key.place:
            yield Key(_CONCERN, f"{key.name} norm"), float(np.sqrt(squares)) / loss_scale


def gradients_of_experts(sums: dict[Key, np.ndarray], loss_scale: float) -> dict[str, np.ndarray]:
    """Return the norm of each expert's gradient, [experts], by layer."""
    return {
        key.place: np.sqrt(squares) / loss_scale
        for key, squares in sums.items()
        if key.concern == _CONCERN and key.name == _BY_EXPERT and key.place
    }
