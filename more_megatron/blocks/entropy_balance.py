"""Balance of the use of experts by the entropy of the routing, pooled over a sequence and over the passes of a loop.

    loss = -H(p),   p = mean over positions and passes of softmax(logits)

for each sequence, and its mean over sequences (Csordas et al., MoEUT, arXiv 2405.16039). A token is free to be sure of
its experts, and a pass to prefer some of them, as long as the whole sequence uses all. Passes without gradient are
constants of the mean.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from more_megatron.blocks.statistics import record_loss
from more_megatron.config import MoREConfig
from more_megatron.model.micro_batch import Pass


def sum_over_positions(logits: torch.Tensor) -> torch.Tensor:
    """Return the sum of each sequence's routing distributions, float32 [b, ..., experts], of [s, b, ..., experts]."""
    return logits.float().softmax(dim=-1).sum(dim=0)


class EntropyBalance:
    """The balance of one router of a layer in a group that is repeated; `name` is that of the loss in the log.

    Sums of the distributions travel from pass to pass; the last pass makes the loss of them and attaches it. Under
    sequence parallelism a rank has its positions only, and the sums are added up.
    """

    def __init__(self, name: str, coefficient: float, config: MoREConfig, groups: ProcessGroupCollection) -> None:
        self._name, self._coefficient, self._config, self._groups = name, coefficient, config, groups
        self._shards = groups.tp.size() if config.sequence_parallel else 1

    def attach(self, activation: torch.Tensor, sums: torch.Tensor, current: Pass, layer_number: int) -> torch.Tensor:
        """Pool the distributions of a pass and, if it is the last, attach the loss to the backward pass.

        Args:
            activation: What carries the loss, [s, b, h]; it is returned.
            sums: From `sum_over_positions`, of this rank's part of the sequence.
            current: The pass.
            layer_number: Number of the layer, from 1.
        """
        key = (layer_number, self._name)
        former = current.former.get(key)
        sums = sums if former is None else former + sums
        if not current.is_last:
            current.leave(key, sums)
            return activation
        positions = activation.size(0) * self._shards
        loss = self._loss(sums, positions * current.micro_batch.depth.steps)
        if current.is_counted():
            record_loss(self._name, loss, self._config, layer_number, self._groups.tp_dp_cp)
        weight = self._coefficient
        if weight == 0.0:
            return activation
        if self._config.calculate_per_token_loss:
            # Megatron divides the gradient by the number of tokens of all ranks.
            weight *= positions * activation.size(1)
        return MoEAuxLossAutoScaler.apply(activation, loss * weight)

    def _loss(self, sums: torch.Tensor, count: int) -> torch.Tensor:
        if self._shards > 1:
            # Backward each rank takes the whole gradient of the loss to its own positions.
            sums = reduce_from_tensor_model_parallel_region(sums, group=self._groups.tp)
        mean = (sums / count).clamp(min=torch.finfo(sums.dtype).tiny)
        return (mean * mean.log()).sum(dim=-1).mean()
