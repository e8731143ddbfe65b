"""Position and time signals: what is added to the stream in front of every pass through a repeated group.

Dehghani et al., arXiv 1807.03819, section 2, as Tensor2Tensor computes it: both stay in the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.costs import Cost
from more_megatron.model.initialization import BlockInitializer

__all__ = ["Signals", "sinusoid"]

_LONGEST = 1e4


def sinusoid(places: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the sines, then the cosines, of places at wavelengths that grow geometrically; float32 [..., channels].

    Args:
        places: Positions or steps, of any shape.
        channels: Even.
    """
    pairs = channels // 2
    exponent = torch.arange(pairs, dtype=torch.float32, device=places.device) / max(pairs - 1, 1)
    angles = places.float().unsqueeze(-1) * torch.exp(exponent * -math.log(_LONGEST))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


@dataclass(frozen=True)
class Signals:
    """The position of each token, and the number of the pass.

    Attributes:
        learned_steps: Passes for which there is a learned time signal; None: the time signal is the sinusoid.
    """

    learned_steps: int | None = None

    def build(self, config: MoREConfig, group: int) -> torch.nn.Module:
        """Return the module that adds the signals.

        Args:
            config: Model configuration.
            group: Number of the group in the stack, from 0.
        """
        return _Signals(config, self.learned_steps, group)

    def cost(self, config: MoREConfig) -> Cost:
        """Return the cost: a token meets the whole table over the passes."""
        weights = (self.learned_steps or 0) * config.hidden_size
        return Cost(weights, weights)


class _Signals(MegatronModule):
    """The table is a matrix of the stage that every tensor-parallel rank holds, as norms are."""

    def __init__(self, config: MoREConfig, learned_steps: int | None, group: int) -> None:
        super().__init__(config=config)
        self._rows = learned_steps
        if learned_steps is None:
            return
        shape = (learned_steps, config.hidden_size)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.time = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        setattr(self.time, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if config.perform_initialization:
            initializer = BlockInitializer(config, group + 1)
            self.time.data.copy_(initializer.normal(shape, "loop/time", config.hidden_size**-0.5))

    def positions(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the signal of positions, [s, b], as [s, b, h]."""
        return sinusoid(positions, self.config.hidden_size).to(dtype)

    def forward(self, state: torch.Tensor, of_positions: torch.Tensor, index: int) -> torch.Tensor:
        """Return the state with both signals.

        Args:
            state: [s, b, h].
            of_positions: From `positions`.
            index: Number of the pass, from 0.
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
