"""`moe`: Megatron's mixture of experts, the baseline."""

from .interface import System

SYSTEM = System(recurrent=False)
