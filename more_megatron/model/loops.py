"""How a group of layers is repeated, and what is added to the stream or injected in front of every pass.

A loop is a module that a decoder calls with the hidden states in front of the group and a function that runs the group
once. Recurrences that inject their input in every step start from a random state and take their first steps without
gradient; residual ones start from their input, and the increments of those steps are constants.
"""

import functools
import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.hf.exported.attention import sinusoid
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.halting import Halting, StateInPass
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.noise import TokenGrid
from more_megatron.model.stack import Loop
from more_megatron.model.truncation import iterate_residual, iterate_state
from more_megatron.monitoring.recurrence import watch_states


class Signals(MegatronModule):
    """What is added to the stream in front of every pass: the position of each token, and the number of the pass.

    Dehghani et al., arXiv 1807.03819, section 2, as Tensor2Tensor computes it: both stay in the stream. Up to
    `learned_steps` passes there is a learned time signal; if that is None, it is the sinusoid.
    """

    def __init__(self, config: MoREConfig, group: int, *, learned_steps: int | None) -> None:
        super().__init__(config=config)
        self._rows = learned_steps
        if learned_steps is not None:
            shape, initializer = (learned_steps, config.hidden_size), BlockInitializer(config, group + 1)
            draw = functools.partial(BlockInitializer.normal, std=config.hidden_size**-0.5)
            self.time = initializer.replicated_parameter(shape, "loop/time", draw)

    def of_positions(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the signal of positions, int64 [s, b], as [s, b, h]."""
        return sinusoid(positions, self.config.hidden_size).to(dtype)

    def forward(self, state: torch.Tensor, of_positions: torch.Tensor, index: int) -> torch.Tensor:
        """Return a state, [s, b, h], with both signals of the pass `index`, from 0.

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


class ResidualLoop(torch.nn.Module):
    """Repeats a group on its own output.

    Args:
        adds_input: Whether the input of the group is added before every pass but the first.
        signals: Builds position and time signals that are added before every pass.
        halting: Builds what ends positions; None: they all take all passes.
    """

    def __init__(
        self,
        config: MoREConfig,
        group: int,
        pg_collection: ProcessGroupCollection,
        *,
        adds_input: bool = False,
        signals: Callable[..., Signals] | None = None,
        halting: Callable[..., Halting] | None = None,
    ) -> None:
        super().__init__()
        self._adds_input = adds_input
        self.signals = None if signals is None else signals(config, group)
        self.halting = None if halting is None else halting(config, group, pg_collection)

    def forward(self, inputs: torch.Tensor, run: StateInPass, depth: Depth, grid: TokenGrid) -> torch.Tensor:
        """Return the hidden states after all passes, [s, b, h], given those in front of the group."""
        enter, see = self._entrance(inputs, grid), watch_states(grid.place, depth.steps)
        if self.halting is not None:
            return self.halting(inputs, enter, run, depth, see)

        def step(state: torch.Tensor, carried: None, index: int) -> tuple[torch.Tensor, None]:
            return run(enter(state, index), index), carried

        return iterate_residual(step, inputs, depth, see)

    def _entrance(self, inputs: torch.Tensor, grid: TokenGrid) -> StateInPass:
        """Return what turns a state into what enters a pass."""
        signals = self.signals
        of_positions = None if signals is None else signals.of_positions(grid.positions, inputs.dtype)

        def enter(state: torch.Tensor, index: int) -> torch.Tensor:
            if self._adds_input and index > 0:
                state = state + inputs
            return state if signals is None else signals(state, of_positions, index)

        return enter


class InjectedLoop(MegatronModule):
    """Repeats a group on a state into which the input is injected in every step (arXiv 2502.05171, section 3).

    Args:
        injection: "linear": `A [s; e]`, with A h x 2h and its first half for the state; "add": `s + e`.
        random_state: Whether the state is random at first; else it is the input.
    """

    def __init__(
        self,
        config: MoREConfig,
        group: int,
        pg_collection: ProcessGroupCollection,
        *,
        injection: str,
        random_state: bool,
    ) -> None:
        super().__init__(config=config)
        self._injection, self._random_state, self._group = injection, random_state, group
        if injection == "linear":
            shape, initializer = (config.hidden_size, 2 * config.hidden_size), BlockInitializer(config, group + 1)
            self.adapter = initializer.replicated_parameter(shape, "loop/adapter", BlockInitializer.takase_in)

    def forward(self, inputs: torch.Tensor, run: StateInPass, depth: Depth, grid: TokenGrid) -> torch.Tensor:
        """Return the hidden states after all passes, [s, b, h], given those in front of the group."""
        state = inputs
        if self._random_state:
            state = grid.noise(self._group + 1, self.config.recurrence_state_std).to(inputs.dtype)
        inject: Callable[[torch.Tensor], torch.Tensor] = functools.partial(torch.add, inputs)
        if self._injection == "linear":
            inject = linear_injection(self.adapter, inputs)

        def step(state: torch.Tensor, index: int) -> torch.Tensor:
            return run(inject(state), index)

        return iterate_state(step, state, depth, watch_states(grid.place, depth.steps, inputs))


def linear_injection(adapter: torch.Tensor, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `A [s; e]` as a function of the state, given A, [h, 2h]: what the input contributes is computed once."""
    of_state, of_input = adapter.chunk(2, dim=1)
    injected = torch.nn.functional.linear(inputs, of_input)
    return lambda state: torch.nn.functional.linear(state, of_state) + injected


def injected_loop(config: MoREConfig, injection: str, *, random_state: bool = True) -> Loop:
    """Return an `InjectedLoop` with its cost: the half of the adapter that sees the input is computed once."""
    half = linear_cost(config.hidden_size, config.hidden_size) if injection == "linear" else Cost()
    module = functools.partial(InjectedLoop, injection=injection, random_state=random_state)
    return Loop(module, half + half.in_every_step())
