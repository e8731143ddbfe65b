"""The model configuration: Megatron's, plus the flags that describe recurrence."""

import dataclasses
import functools
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from more_megatron.flags import MoREFlags


@dataclass
class MoREConfig(MoREFlags, TransformerConfig):
    """Megatron's configuration with the flags that systems share.

    The fields below are flags of Megatron's that its own configuration does not hold.
    """

    seed: int = 1234
    """Seed of the run: depth and initial states are drawn from it."""

    overlap_grad_reduce: bool = False
    """Whether gradients are reduced while the backward pass runs."""

    overlap_param_gather: bool = False
    """Whether the distributed optimizer gathers parameters while the forward pass runs."""

    def __post_init__(self) -> None:
        """Complete and check the fields, Megatron's and ours.

        Raises:
            MoREError: If a field is out of range or contradicts another; the message names the flag.
        """
        TransformerConfig.__post_init__(self)
        MoREFlags.__post_init__(self)
        self.check()

    def check(self) -> None:
        """Check the flags that one system alone reads; its dataclass of flags overrides this."""


@functools.cache
def config_class(own_flags: type | None) -> type[MoREConfig]:
    """Return the configuration class of a system, given the dataclass of the flags that it alone reads, if any."""
    if own_flags is None:
        return MoREConfig
    return dataclasses.make_dataclass("MoREConfig", [], bases=(own_flags, MoREConfig))
