"""`recurrent_experts`: each expert is a recurrent block of its own."""

from __future__ import annotations

from .fields import Config
from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock, block_width


class RecurrentExpertsMoE(MixingMoE):
    """Expert i computes `s <- Block_i(Adapter_i([s; x]))`, r times."""

    @staticmethod
    def experts_class(config: Config) -> RecurrentBlock:
        return RecurrentBlock(config, config.num_experts)


class RecurrentExperts(BlockSystem):
    """The layers with such experts."""

    moe_class = RecurrentExpertsMoE
    fields = {"recurrent_intermediate_size": block_width(2)}  # noqa: RUF012


SYSTEM = RecurrentExperts()
