"""`loop`: groups of ordinary layers repeated, with or without prelude, coda and injection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .division import AROUND, InjectedLoop, RepeatedMoE, check_division, divided, injection
from .fields import LOGIT_EMA, Config, Field
from .interface import Group, System

__all__ = ["SYSTEM"]


class _Repetition(InjectedLoop):
    """Repeats a group on its own output."""

    def add(self, state: Tensor, hidden_states: Tensor, step: int) -> Tensor:
        """Return the state, to which the input is added in front of every pass but the first."""
        return state + hidden_states if self.config.injection == "add" and step > 0 else state


class LoopedTransformer(System):
    """Megatron's layers in groups."""

    moe_class = RepeatedMoE
    fields = {  # noqa: RUF012
        **AROUND,
        "group_layers": Field(
            int, None, "Layers of a group; None: one group has all that are repeated.", low=1, optional=True
        ),
        "injection": injection("none"),
        "router_logit_ema": LOGIT_EMA,
    }

    def check(self, values: Mapping[str, Any]) -> None:
        """Check that the numbers of layers agree."""
        check_division(values)

    def groups(self, config: Config) -> Sequence[Group]:
        """Return the groups of the stack."""
        return divided(config, _Repetition, config.group_layers)


SYSTEM = LoopedTransformer()
