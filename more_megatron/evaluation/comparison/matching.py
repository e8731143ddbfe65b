"""Systems at equal cost: how wide the parts of each must be so that it costs what the others cost.

Widths are found by bisection on the cost formulas, on which nothing has to be linear: a GRU of its own width costs the
square of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from megatron.core.fp8_utils import get_fp8_align_size
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth
from more_megatron.systems import get_system

__all__ = ["match", "system_cost", "widths"]

# `torch.nn.functional.grouped_mm` wants rows of so many.
_ALIGNMENT_BYTES = 16
# Products are faster on rows of whole cache lines (64 bytes on a CPU) or tiles (128 on a GPU). So a width is a
# multiple of so many alignments, the first of these at which the goal is missed by no more than this part of it.
_COARSER, _MISSED = (8, 4, 2), 0.002
# Of such steps: more than any model has.
_MOST = 1 << 24


def system_cost(model_config: GPTModelConfig, seq_length: int) -> Cost:
    """Return the cost of a whole model, its embeddings included; its vocabulary is padded."""
    config, tied = model_config.transformer, model_config.share_embeddings_and_output_weights
    return get_system(config.more_variant).model_cost(config, seq_length, model_config.vocab_size, tied)


def widths(config: MoREConfig) -> tuple[str, ...]:
    """Return the fields that widen a model: that of what is repeated, and that of the shared expert if there is one."""
    own = get_system(config.more_variant).width_flag(config)
    shared = config.num_moe_experts is not None and config.moe_shared_expert_intermediate_size is not None
    return (own, "moe_shared_expert_intermediate_size") if shared else (own,)


def match(
    model_config: GPTModelConfig,
    depth: Depth,
    seq_length: int,
    *,
    flops: float | None = None,
    parameters: float | None = None,
) -> GPTModelConfig:
    """Return the model with widths chosen so that it costs what is wanted; the given one stays as it is.

    One goal, operations a token of a training step at a depth or parameters that are stored, sets the width of what is
    repeated. Two set that of the shared expert as well; a system without one, or whose two widths cannot serve both,
    meets the operations and comes as near to the parameters as they allow.

    Raises:
        MoREError: If the system costs more than that at any width.
    """
    own, *shared = widths(model_config.transformer)
    search = _Search(model_config, depth, seq_length)
    measure, goal = (search.parameters, parameters or 0.0) if flops is None else (search.flops, flops)
    if flops is None or parameters is None or not shared:
        search.refuse_below_least(measure, goal, (own,))
        return search.wide({own: search.nearest_width(own, measure, goal, {})})
    search.refuse_below_least(measure, goal, (own, *shared))
    return search.wide(search.two_widths(own, shared[0], flops, parameters))


class _Search:
    """Costs of a model at any width, and widths at which they are reached."""

    def __init__(self, model_config: GPTModelConfig, depth: Depth, seq_length: int) -> None:
        self._model, self._depth, self._seq_length = model_config, depth, seq_length
        self._step = _width_multiple(model_config.transformer)

    def wide(self, widths: Mapping[str, int]) -> GPTModelConfig:
        """Return the model with other widths."""
        changed = copy.copy(self._model)
        changed.transformer = copy.copy(self._model.transformer)
        for name, value in widths.items():
            setattr(changed.transformer, name, value)
        # The stack holds widths of its own.
        changed.transformer_layer_spec = get_system(changed.transformer.more_variant).stack(changed.transformer)
        return changed

    def _cost(self, widths: Mapping[str, int]) -> Cost:
        return system_cost(self.wide(widths), self._seq_length)

    def flops(self, widths: Mapping[str, int]) -> float:
        """Return operations a token of a training step."""
        return self._cost(widths).training_flops(self._depth.no_grad_steps, self._depth.grad_steps)

    def parameters(self, widths: Mapping[str, int]) -> float:
        """Return parameters."""
        return self._cost(widths).parameters

    def refuse_below_least(self, measure: Callable[..., float], target: float, names: Sequence[str]) -> None:
        """Raise a MoREError if `measure` is above `target` at any widths."""
        least = measure(dict.fromkeys(names, self._step))
        if least > target:
            system, what = self._model.transformer.more_variant, measure.__name__
            raise MoREError(
                f"{system} has {least / 1e6:.2f} M {what} at the least, more than {target / 1e6:.2f} M: raise what is "
                "to be met, or give it fewer layers, experts or recurrence steps"
            )

    def nearest_width(self, name: str, measure: Callable[..., float], target: float, others: Mapping[str, int]) -> int:
        """Return the width at which `measure` is nearest to `target`, given other widths."""
        return self._step * _nearest_round(lambda count: measure({**others, name: count * self._step}), target)

    def two_widths(self, own: str, shared: str, flops: float, parameters: float) -> dict[str, int]:
        """Return the width of the shared expert at which the other one serves both goals, or nearly, and that one."""
        most = self.nearest_width(shared, self.flops, flops, {own: self._step}) // self._step

        def both_at(count: int) -> dict[str, int]:
            fixed = {shared: count * self._step}
            return fixed | {own: self.nearest_width(own, self.flops, flops, fixed)}

        def parameters_at(count: int) -> float:
            return self.parameters(both_at(count))

        # What the shared expert takes from routed ones, of which a token meets few, makes the model smaller.
        sign = 1 if parameters_at(most) > parameters_at(1) else -1
        return both_at(_nearest_round(lambda count: sign * parameters_at(count), sign * parameters, most))


def _nearest_round(measure: Callable[[int], float], target: float, most: int = _MOST) -> int:
    """Return a multiple of the largest of `_COARSER` at which the target is all but met, or else the nearest number."""
    nearest = _nearest(measure, target, most)
    for coarser in _COARSER:
        count = coarser * max(1, round(nearest / coarser))
        if count <= most and abs(measure(count) - target) <= _MISSED * abs(target):
            return count
    return nearest


def _nearest(measure: Callable[[int], float], target: float, most: int) -> int:
    """Return the number from 1 to `most` at which a measure that rises is nearest to `target`."""
    # With two widths a measure rises but roughly: another order of the search would end at another number.
    low, high = 0, 1
    while high < most and measure(high) < target:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return low if low > 0 and target - measure(low) < measure(high) - target else high


def _width_multiple(config: MoREConfig) -> int:
    """Return what a width must be a multiple of: ranks that split it, times what products of grouped rows want."""
    ranks = max(config.tensor_model_parallel_size, config.expert_tensor_parallel_size or 1)
    if config.fp8 is not None:
        return ranks * int(get_fp8_align_size(config.fp8_recipe))
    return ranks * max(_ALIGNMENT_BYTES // config.params_dtype.itemsize, 1)
