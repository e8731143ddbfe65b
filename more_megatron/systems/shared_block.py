"""Synthesis I, option B: experts are projections around one recurrent block of the layer.

y_i = W_out_i . R(W_in_i . x)
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from more_megatron.blocks.refusals import expert_refusals, mixing_refusals, recurrence_refusals
from more_megatron.flags import check_ranges
from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import Row, block_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.watch import Watch


@dataclass
class ProjectionFlags:
    """How the projections around a shared block are regularized."""

    projection_orthogonality_coeff: float = 0.0
    """Coefficient of the penalty on projections around a shared block that are not orthogonal."""

    projection_dropout: float = 0.0
    """Dropout on the output of the projections around a shared block."""

    def check(self) -> None:
        """Check the fields."""
        check_ranges(self, {"projection_orthogonality_coeff": "[0, inf)", "projection_dropout": "[0, 1)"})


class SharedBlock(System):
    """Projections into and out of one recurrent block; the tokens sent to an expert attend to each other."""

    name = "shared_block"
    summary = "expert i is a projection into and out of one recurrent block of the layer"
    reads = DEPTH | {"recurrence_state_std", "recurrence_ffn_hidden_size"}
    Flags = ProjectionFlags
    block_width = 4
    mixes_tokens = True
    expert_rows = (
        Row("mlp.experts.proj_in", "mlp.experts.proj_in", "N h h"),
        Row("mlp.experts.proj_out", "mlp.experts.proj_out", "N h h"),
        *block_rows("mlp.recurrent_block", "mlp.recurrent_block", "1"),
    )

    def refusals(self, config: "MoREConfig") -> Iterator[str]:
        yield from recurrence_refusals(config)
        yield from expert_refusals(config, self.ffn_hidden_size(config))
        yield from mixing_refusals(config)
        tensor_ranks = config.tensor_model_parallel_size
        if 1 < config.expert_tensor_parallel_size < tensor_ranks:
            yield f"needs --expert-tensor-parallel-size 1 or {tensor_ranks}, like the tensor parallelism"
        if config.calculate_per_token_loss and config.projection_orthogonality_coeff:
            yield "has a penalty a layer: --projection-orthogonality-coeff excludes --calculate-per-token-loss"

    def losses(self, config: "MoREConfig") -> tuple[str, ...]:
        return ("orthogonality_loss",) if config.projection_orthogonality_coeff > 0.0 else ()

    def record_health(self, watch: "Watch", module: Any, share: float) -> None:
        """Record how far the projections are from orthogonal, and from each other."""
        from more_megatron.blocks.block_experts import SharedBlockMoELayer

        if isinstance(module, SharedBlockMoELayer):
            module.experts.record_projections(watch, f"layer {module.layer_number}", share)

    def stack(self, config: "MoREConfig") -> "Stack":
        from more_megatron.blocks.block_experts import ProjectionExperts, SharedBlockMoELayer, projection_experts_cost
        from more_megatron.blocks.layers import expert_stack

        width = self.ffn_hidden_size(config)
        moe = functools.partial(SharedBlockMoELayer, ffn_hidden_size=width)
        return expert_stack(config, moe, ProjectionExperts, functools.partial(projection_experts_cost, config, width))


SYSTEM = SharedBlock()
