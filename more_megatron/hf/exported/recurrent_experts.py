"""`recurrent_experts`: expert i is a recurrent block of its own, `s <- Block_i(Adapter_i([s; x]))`, r times."""

from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock

SYSTEM = BlockSystem(2, moe_class=MixingMoE, experts_class=lambda config: RecurrentBlock(config, config.num_experts))
