"""Position and time signals: what is added to the stream in front of every pass through a repeated group.

Dehghani et al., arXiv 1807.03819, section 2, as Tensor2Tensor computes it: both stay in the stream.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost
from more_megatron.model.initialization import BlockInitializer, replicated_parameter

__all__ = ["Signals", "signals_cost", "sinusoid"]

_LONGEST = 1e4


def sinusoid(places: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the sines, then the cosines, of places at wavelengths that grow geometrically; float32 [..., channels]."""
    pairs = channels // 2
    exponent = torch.arange(pairs, dtype=torch.float32, device=places.device) / max(pairs - 1, 1)
    angles = places.float().unsqueeze(-1) * torch.exp(exponent * -math.log(_LONGEST))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Signals(MegatronModule):
    """The position of each token, and the number of the pass.

    Up to `learned_steps` passes there is a learned time signal; if that is None, it is the sinusoid.
    """

    def __init__(self, config: MoREConfig, group: int, *, learned_steps: int | None) -> None:
        super().__init__(config=config)
        self._rows = learned_steps
        if learned_steps is not None:
            shape, initializer = (learned_steps, config.hidden_size), BlockInitializer(config, group + 1)
            self.time = replicated_parameter(
                config, shape, lambda: initializer.normal(shape, "loop/time", config.hidden_size**-0.5)
            )

    def of_positions(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the signal of positions, int64 [s, b], as [s, b, h]."""
        return sinusoid(positions, self.config.hidden_size).to(dtype)

    def forward(self, state: torch.Tensor, of_positions: torch.Tensor, index: int) -> torch.Tensor:
        """Return a state, [s, b, h], with both signals of a pass of a number.

        It is a call of a module because the overlapped gathering of parameters waits for the table in front of one.
        """
        return state + of_positions + self._time(index, state)

    def _time(self, index: int, state: torch.Tensor) -> torch.Tensor:
        if self._rows is None:
            place = torch.full((), float(index), device=state.device)
            return sinusoid(place, self.config.hidden_size).to(state.dtype)
        if index >= self._rows:
            raise MoREError(
                f"the learned time signal was trained for {self._rows} steps, and more were asked for: take at most "
                "that many, or train with --universal-time-signal sinusoid"
            )
        return (self.time[index] * math.sqrt(self.config.hidden_size)).to(state.dtype)


def signals_cost(config: MoREConfig, learned_steps: int | None) -> Cost:
    """Return the cost of `Signals`: a token meets the whole table over the passes."""
    weights = (learned_steps or 0) * config.hidden_size
    return Cost(weights, weights)
