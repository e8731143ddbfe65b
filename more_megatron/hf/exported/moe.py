"""`moe`: Megatron's mixture of experts, the baseline."""

from .interface import System

__all__ = ["SYSTEM"]


class MoE(System):
    """Without recurrence."""

    recurrent = False


SYSTEM = MoE()
