"""Systems at equal cost: how wide the parts of each must be so that it costs what the others cost.

Widths are found by bisection on the cost formulas, on which nothing has to be linear: a GRU of its own width costs the
square of it.
"""

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from megatron.core.fp8_utils import get_fp8_align_size
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.evaluation.runs import configure
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth, DepthSampler
from more_megatron.systems import get_system

# `torch.nn.functional.grouped_mm` wants rows of so many.
_ALIGNMENT_BYTES = 16
# Products are faster on rows of whole cache lines (64 bytes on a CPU) or tiles (128 on a GPU). So a width is a
# multiple of so many alignments, the first of these at which the goal is missed by no more than this part of it.
_COARSER, _MISSED = (8, 4, 2), 0.002
# Of such steps: more than any model has.
_MOST = 1 << 24


@dataclass(frozen=True)
class Described:
    """A model that is described and not built, at the depth of a training step."""

    args: Namespace  # of the run
    config: GPTModelConfig
    depth: Depth

    @classmethod
    def by(cls, command_line: str, depth: Depth | None = None) -> Self:
        """Return the model of the flags of a run, at its mean depth unless another is given."""
        args, config = configure(command_line)
        return cls(args, config, depth or DepthSampler(config.transformer).expected())

    @functools.cached_property
    def cost(self) -> Cost:
        """Cost of the whole model, its embeddings included; its vocabulary is padded."""
        config, tied = self.config.transformer, self.config.share_embeddings_and_output_weights
        system = get_system(config.more_variant)
        return system.model_cost(config, self.args.seq_length, self.config.vocab_size, tied)

    @property
    def parameters(self) -> int:
        """Parameters that are stored."""
        return self.cost.parameters

    @property
    def flops(self) -> float:
        """Operations a token of a training step."""
        return self.cost.training_flops(self.depth.no_grad_steps, self.depth.grad_steps)

    @property
    def widths(self) -> tuple[str, ...]:
        """Fields that widen it: the width of what is repeated, and that of the shared expert if there is one."""
        config = self.config.transformer
        own = get_system(config.more_variant).width_flag(config)
        shared = config.num_moe_experts is not None and config.moe_shared_expert_intermediate_size is not None
        return (own, "moe_shared_expert_intermediate_size") if shared else (own,)

    def wide(self, widths: Mapping[str, int]) -> Self:
        """Return the model with other widths."""
        config = copy.copy(self.config)
        config.transformer = copy.copy(self.config.transformer)
        for name, value in widths.items():
            setattr(config.transformer, name, value)
        # The stack holds widths of its own.
        config.transformer_layer_spec = get_system(config.transformer.more_variant).stack(config.transformer)
        return type(self)(self.args, config, self.depth)

    def match(self, **goals: float) -> Self:
        """Return the model with widths chosen so that it costs what is wanted.

        One goal, `flops` or `parameters`, sets the width of what is repeated. Two set that of the shared expert as
        well; a system without one, or whose two widths cannot serve both, meets the operations and comes as near to the
        parameters as they allow.

        Raises:
            MoREError: If the system costs more than that at any width.
        """
        own, *shared = self.widths
        measure = "flops" if "flops" in goals else "parameters"
        has_two = len(goals) > 1 and bool(shared)
        least = self._measured(measure, dict.fromkeys(self.widths if has_two else (own,), self._step))
        if least > goals[measure]:
            raise MoREError(
                f"{self.config.transformer.more_variant} has {least / 1e6:.2f} M {measure} at the least, more than "
                f"{goals[measure] / 1e6:.2f} M: raise what is to be met, or give it fewer layers, experts or "
                "recurrence steps"
            )
        if has_two:
            return self.wide(self._two_widths(own, shared[0], goals["flops"], goals["parameters"]))
        return self.wide({own: self._nearest_width(own, measure, goals[measure], {})})

    def _measured(self, measure: str, widths: Mapping[str, int]) -> float:
        return float(getattr(self.wide(widths), measure))

    @property
    def _step(self) -> int:
        """What a width must be a multiple of: ranks that split it, times what products of grouped rows want."""
        config: MoREConfig = self.config.transformer
        ranks = max(config.tensor_model_parallel_size, config.expert_tensor_parallel_size or 1)
        if config.fp8 is not None:
            return ranks * int(get_fp8_align_size(config.fp8_recipe))
        return ranks * max(_ALIGNMENT_BYTES // config.params_dtype.itemsize, 1)

    def _nearest_width(self, name: str, measure: str, target: float, others: Mapping[str, int]) -> int:
        """Return the width at which a measure is nearest to `target`, given other widths."""
        step = self._step
        return step * _nearest_round(lambda count: self._measured(measure, {**others, name: count * step}), target)

    def _two_widths(self, own: str, shared: str, flops: float, parameters: float) -> dict[str, int]:
        """Return the width of the shared expert at which the other one serves both goals, or nearly, and that one."""
        step = self._step
        most = self._nearest_width(shared, "flops", flops, {own: step}) // step

        def both_at(count: int) -> dict[str, int]:
            fixed = {shared: count * step}
            return fixed | {own: self._nearest_width(own, "flops", flops, fixed)}

        def parameters_at(count: int) -> float:
            return self._measured("parameters", both_at(count))

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
