"""How a group of layers is repeated.

A loop is a module that a decoder calls with the hidden states in front of the group and a function that runs the group
once. Recurrences that inject their input in every step start from a random state and take their first steps without
gradient; residual ones start from their input, and the increments of those steps are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.halting import Halting, StateInPass
from more_megatron.model.initialization import BlockInitializer, replicated_parameter
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import local_coordinates, state_noise
from more_megatron.model.signals import Signals
from more_megatron.model.stack import Loop
from more_megatron.model.truncation import iterate_residual, iterate_state
from more_megatron.monitoring.recurrence import watch_states

__all__ = ["InjectedLoop", "ResidualLoop", "TokenGrid", "injected_loop"]


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of this rank stand."""

    shape: torch.Size  # of the hidden states, [s, b, h]; s is this rank's part of the sequence
    coordinates: torch.Tensor  # sequence, position and sample id of each token, int64 [s * b, 3]
    seed: int  # seed of the run
    place: str = ""  # where in the model they are, in words

    @classmethod
    def of(
        cls,
        hidden_states: torch.Tensor,
        micro_batch: MicroBatch,
        config: MoREConfig,
        tp_group: torch.distributed.ProcessGroup,
        place: str = "",
        first_sequence: int = 0,
    ) -> TokenGrid:
        """Return the grid of this rank's hidden states, [s, b, h]; sequence parallelism splits s over `tp_group`.

        Sequences are counted from `first_sequence`.
        """
        coordinates = local_coordinates(
            hidden_states.shape,
            micro_batch.sample_ids,
            first_sequence=first_sequence,
            sequence_shard=tp_group.rank() if config.sequence_parallel else 0,
            device=hidden_states.device,
            starts=micro_batch.starts,
        )
        return cls(hidden_states.shape, coordinates, config.seed, place)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token, int64 [s, b]."""
        return self.coordinates[:, 1].view(self.shape[:2])

    def noise(self, layer: int, std: float) -> torch.Tensor:
        """Return random states, float32 [s, b, h]; `layer` sets those of one recurrence apart from those of another."""
        _, positions, sample_ids = self.coordinates.unbind(1)
        noise = state_noise(sample_ids, positions, self.shape[-1], seed=self.seed, layer=layer, std=std)
        return noise.view(self.shape)


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
            self.adapter = replicated_parameter(
                config, shape, lambda: initializer.truncated_normal(shape, "loop/adapter", initializer.in_std)
            )

    def forward(self, inputs: torch.Tensor, run: StateInPass, depth: Depth, grid: TokenGrid) -> torch.Tensor:
        """Return the hidden states after all passes, [s, b, h], given those in front of the group."""
        state = inputs
        if self._random_state:
            state = grid.noise(self._group + 1, self.config.recurrence_state_std).to(inputs.dtype)
        inject, passes = self._injector(inputs), iter(range(depth.steps))
        see = watch_states(grid.place, depth.steps, inputs)
        return iterate_state(lambda state: run(inject(state), next(passes)), state, depth, see)

    def _injector(self, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._injection == "add":
            return lambda state: state + inputs
        of_state, of_input = self.adapter.split(self.config.hidden_size, dim=1)
        injected = torch.nn.functional.linear(inputs, of_input)
        return lambda state: torch.nn.functional.linear(state, of_state) + injected


def injected_loop(config: MoREConfig, injection: str, *, random_state: bool = True) -> Loop:
    """Return an `InjectedLoop` with its cost: the half of the adapter that sees the input is computed once."""
    half = linear_cost(config.hidden_size, config.hidden_size) if injection == "linear" else Cost()
    module = functools.partial(InjectedLoop, injection=injection, random_state=random_state)
    return Loop(module, half + half.in_every_step())
