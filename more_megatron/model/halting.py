"""Halting: each position decides for itself after how many passes its output is done (ACT; Graves, arXiv 1603.08983).

In every pass a position halts with a probability that depends on its state. Its output is the mean of its states under
the distribution that these probabilities make. All positions take part in all passes, halted ones too, as in
Tensor2Tensor: what others attend to does not stop, and all ranks take the same number of passes, so that collectives
meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from more_megatron.config import MoREConfig
from more_megatron.model.attached_loss import attach_mean
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.truncation import detached_increments, iterate
from more_megatron.monitoring.figures import record_figure

HALTING_FIGURES = ("steps to halt", "halting remainder", "share never halting", "ponder cost")

# A state, [s, b, h], and the number of a pass, from 0, to another state.
StateInPass = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class _Progress:
    """Where each position stands."""

    state: torch.Tensor  # [s, b, h]
    output: torch.Tensor  # output so far, [s, b, h]
    entered: torch.Tensor  # how much of the output is the input that the states were increments to, float32 [s, b, 1]
    probability: torch.Tensor  # sum of the probabilities of the passes before it halted, float32 [s, b, 1]
    remainder: torch.Tensor  # weight of the pass in which it halted, float32 [s, b, 1]; 0 before
    steps: torch.Tensor  # passes until it halted, that one included, float32 [s, b, 1]
    halted: torch.Tensor  # whether it has, [s, b, 1]

    @classmethod
    def start(cls, inputs: torch.Tensor) -> _Progress:
        zero = torch.zeros(*inputs.shape[:-1], 1, dtype=torch.float32, device=inputs.device)
        return cls(inputs, torch.zeros_like(inputs), zero, zero, zero, zero, torch.zeros_like(zero, dtype=torch.bool))

    def detached(self) -> _Progress:
        """Return the same as constants."""
        fields = {field.name: getattr(self, field.name).detach() for field in dataclasses.fields(self)}
        return _Progress(**fields)

    def incremented(self, inputs: torch.Tensor) -> _Progress:
        """Return the same as if all there is were constants added to the input."""
        return dataclasses.replace(
            self,
            state=detached_increments(inputs, self.state),
            output=detached_increments(inputs * self.entered.to(inputs.dtype), self.output),
        )


class Halting(MegatronModule):
    """Repeats a group until positions have halted.

    Args:
        epsilon: A position halts when the sum of its probabilities exceeds one minus this.
        accumulates: Whether the output is the sum of the weighted states; else each pass moves it by its weight from
            where it was to the new state ("basic", Tensor2Tensor's).
        ponder_coeff: Coefficient of the mean of steps and remainder in the loss.
    """

    def __init__(
        self,
        config: MoREConfig,
        group: int,
        pg_collection: ProcessGroupCollection,
        *,
        epsilon: float,
        accumulates: bool,
        ponder_coeff: float,
    ) -> None:
        super().__init__(config=config)
        self._epsilon, self._accumulates, self._ponder_coeff = epsilon, accumulates, ponder_coeff
        self._tp_group = pg_collection.tp
        create = BlockInitializer(config, group + 1).replicated_parameter
        self.weight = create((1, config.hidden_size), "loop/halting", BlockInitializer.glorot)
        # Positions would rather halt early at first.
        self.bias = create((1,), "loop/halting bias", BlockInitializer.ones)

    def forward(
        self,
        inputs: torch.Tensor,
        enter: StateInPass,
        run: StateInPass,
        depth: Depth,
        see: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Return the output of all positions, [s, b, h].

        Args:
            inputs: Where the iteration starts, [s, b, h].
            enter: Maps a state to what enters the pass of this number, which decides who halts in it.
            run: Runs the group once.
            depth: Number of passes: none halts later. The increments of the first ones are constants.
            see: Called with the input and the state after each pass; None if nobody watches.
        """
        progress = iterate(
            lambda progress, index: self._step(progress, enter, run, index),
            _Progress.start(inputs),
            depth,
            detach=_Progress.detached,
            rejoin=lambda before, after: after.incremented(inputs),
            see=None if see is None else lambda progress: see(progress.state),
        )
        return self._with_ponder_loss(progress)

    def _step(self, progress: _Progress, enter: StateInPass, run: StateInPass, index: int) -> _Progress:
        entering = enter(progress.state, index)
        probability = torch.nn.functional.linear(entering.float(), self.weight.float(), self.bias.float()).sigmoid()
        halts = ~progress.halted & (progress.probability + probability > 1.0 - self._epsilon)
        goes_on = ~progress.halted & ~halts
        remainder = 1.0 - progress.probability
        zero = torch.zeros_like(probability)
        weight = torch.where(halts, remainder, torch.where(goes_on, probability, zero))
        state = run(entering, index)
        return _Progress(
            state=state,
            output=self._combined(progress.output, state, weight.to(state.dtype)),
            entered=self._combined(progress.entered, torch.ones_like(weight), weight),
            probability=progress.probability + torch.where(goes_on, probability, zero),
            remainder=progress.remainder + torch.where(halts, remainder, zero),
            steps=progress.steps + ~progress.halted,
            halted=progress.halted | halts,
        )

    def _combined(self, output: torch.Tensor, state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._accumulates:
            return torch.addcmul(output, weight, state)
        return torch.lerp(output, state, weight)

    def _with_ponder_loss(self, progress: _Progress) -> torch.Tensor:
        """Return the output; the loss of steps and remainders, of which only these have a gradient, is attached."""
        if not (self.training and torch.is_grad_enabled()):
            return progress.output
        ponder = (progress.steps + progress.remainder).mean()
        figures = (progress.steps, progress.remainder, ~progress.halted, progress.steps + progress.remainder)
        for name, values in zip(HALTING_FIGURES, figures, strict=True):
            record_figure(name, values)
        if self._ponder_coeff == 0.0 or not ponder.requires_grad:
            return progress.output
        return attach_mean(
            progress.output,
            ponder * self._ponder_coeff,
            ranks=self._tp_group.size() if self.config.sequence_parallel else 1,
            tokens=progress.steps.numel() if self.config.calculate_per_token_loss else None,
        )


def halting_cost(config: MoREConfig) -> Cost:
    """Return the cost of the probability, which is computed in every pass."""
    return Cost(config.hidden_size + 1, config.hidden_size + 1, per_step=2.0 * config.hidden_size)
