"""`moe`: Megatron's mixture of experts, the baseline."""

from .interface import System


class MoE(System):
    """Without recurrence."""

    recurrent = False


SYSTEM = MoE()
