"""How a group of layers is repeated.

A loop is a module that a decoder calls with the hidden states in front of the group and a function that runs the group
once. Recurrences that inject their input in every step start from a random state and take their first steps without
gradient; residual ones start from their input, and the increments of those steps are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.halting import Halting
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import local_coordinates, state_noise
from more_megatron.model.signals import Signals
from more_megatron.model.stack import Loop
from more_megatron.model.truncation import iterate_residual, iterate_state
from more_megatron.monitoring.recurrence import watch_states

__all__ = ["InjectedLoop", "ResidualLoop", "RunGroup", "TokenGrid"]

# Hidden states, [s, b, h], and the number of the pass, from 0, to the hidden states after it.
RunGroup = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of this rank stand.

    Attributes:
        shape: Of the hidden states, [s, b, h]; s is this rank's part of the sequence.
        coordinates: Sequence, position and sample id of each token, int64 [s * b, 3].
        seed: Seed of the run.
        place: Where in the model they are, in words.
    """

    shape: torch.Size
    coordinates: torch.Tensor
    seed: int
    place: str = ""

    @classmethod
    def of(
        cls,
        hidden_states: torch.Tensor,
        micro_batch: MicroBatch,
        config: MoREConfig,
        tp_group: torch.distributed.ProcessGroup,
        place: str = "",
    ) -> TokenGrid:
        """Return the grid of hidden states, [s, b, h].

        Args:
            hidden_states: Of this rank.
            micro_batch: Who its sequences are.
            config: Model configuration.
            tp_group: Tensor-parallel group, over which sequence parallelism splits the sequence.
            place: Where in the model they are, in words.
        """
        coordinates = local_coordinates(
            hidden_states.shape,
            micro_batch.sample_ids,
            first_sequence=0,
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
        """Return random states, float32 [s, b, h].

        Args:
            layer: Number that sets the states of one recurrence apart from those of another.
            std: Standard deviation.
        """
        noise = state_noise(
            self.coordinates[:, 2], self.coordinates[:, 1], self.shape[-1], seed=self.seed, layer=layer, std=std
        )
        return noise.view(self.shape)


@dataclass(frozen=True)
class ResidualLoop(Loop):
    """Repeats a group on its own output.

    Attributes:
        adds_input: Whether the input of the group is added before every pass but the first.
        signals: Position and time signals that are added before every pass.
        halting: When positions end; None: they all take all passes.
    """

    adds_input: bool = False
    signals: Signals | None = None
    halting: Halting | None = None

    def build(self, config: MoREConfig, group: int, pg_collection: ProcessGroupCollection) -> torch.nn.Module:
        """Return the module that repeats the group."""
        signals = None if self.signals is None else self.signals.build(config, group)
        halting = None if self.halting is None else self.halting.build(config, group, pg_collection)
        return _ResidualLoop(self.adds_input, signals, halting)

    def cost(self, config: MoREConfig) -> Cost:
        """Return the cost of signals and halting."""
        return sum((part.cost(config) for part in (self.signals, self.halting) if part is not None), Cost())


class _ResidualLoop(torch.nn.Module):
    def __init__(self, adds_input: bool, signals: Any, halting: Any) -> None:
        super().__init__()
        self._adds_input = adds_input
        self.signals, self.halting = signals, halting

    def forward(self, inputs: torch.Tensor, run: RunGroup, depth: Depth, grid: TokenGrid) -> torch.Tensor:
        enter, see = self._entrance(inputs, grid), watch_states(grid.place, depth.steps)
        if self.halting is not None:
            return self.halting(inputs, enter, run, depth, see)

        def step(state: torch.Tensor, carried: None, index: int) -> tuple[torch.Tensor, None]:
            return run(enter(state, index), index), carried

        return iterate_residual(step, inputs, depth, see)

    def _entrance(self, inputs: torch.Tensor, grid: TokenGrid) -> RunGroup:
        """Return what turns a state into what enters a pass."""
        of_positions = None if self.signals is None else self.signals.positions(grid.positions, inputs.dtype)

        def enter(state: torch.Tensor, index: int) -> torch.Tensor:
            if self._adds_input and index > 0:
                state = state + inputs
            return state if of_positions is None else self.signals(state, of_positions, index)

        return enter


@dataclass(frozen=True)
class InjectedLoop(Loop):
    """Repeats a group on a state into which the input is injected in every step (arXiv 2502.05171, section 3).

    Attributes:
        injection: "linear": `A [s; e]`, with A h x 2h and its first half for the state; "add": `s + e`.
        random_state: Whether the state is random at first; else it is the input.
    """

    injection: str
    random_state: bool = True

    def build(self, config: MoREConfig, group: int, pg_collection: ProcessGroupCollection) -> torch.nn.Module:
        """Return the module that repeats the group."""
        return _InjectedLoop(config, self, group)

    def cost(self, config: MoREConfig) -> Cost:
        """Return the cost of the adapter: the half that sees the input is computed once."""
        if self.injection != "linear":
            return Cost()
        half = linear_cost(config.hidden_size, config.hidden_size)
        return half + half.in_every_step()


class _InjectedLoop(MegatronModule):
    """The adapter is a matrix of the stage that every tensor-parallel rank holds, as norms are."""

    def __init__(self, config: MoREConfig, loop: InjectedLoop, group: int) -> None:
        super().__init__(config=config)
        self._injection, self._random_state, self._group = loop.injection, loop.random_state, group
        if loop.injection == "linear":
            self.adapter = self._new_adapter(config)

    def _new_adapter(self, config: MoREConfig) -> torch.nn.Parameter:
        hidden, device = config.hidden_size, "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        adapter = torch.nn.Parameter(torch.empty(hidden, 2 * hidden, dtype=config.params_dtype, device=device))
        setattr(adapter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if config.perform_initialization:
            initializer = BlockInitializer(config, self._group + 1)
            weight = initializer.truncated_normal((hidden, 2 * hidden), "loop/adapter", initializer.in_std)
            adapter.data.copy_(weight)
        return adapter

    def forward(self, inputs: torch.Tensor, run: RunGroup, depth: Depth, grid: TokenGrid) -> torch.Tensor:
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
