"""`universal`: a group of layers repeated with position and time signals; positions halt by themselves.

Dehghani et al., arXiv 1807.03819, as Tensor2Tensor computes it, as a causal language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import sinusoid
from .fields import LOGIT_EMA, Config, Field
from .interface import System
from .layer import SandwichLayer
from .recurrence import Rows, State, recur
from .stack import Loop, RunPass

_EPSILON = "A position halts when the sum of its probabilities exceeds one minus this."
_OUTPUT = "The sum of the weighted states, or what each pass moves by its weight."


class _HaltingProbability(nn.Linear):
    """Maps a state to the probability of halting, [b, s, h] -> [b, s, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.hidden_size, 1)

    def forward(self, state: Tensor) -> Tensor:
        return nn.functional.linear(state.float(), self.weight.float(), self.bias.float()).sigmoid()


class UniversalLoop(Loop):
    """Adds the signals in front of every pass, and takes the mean of the states under the distribution of halting."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        shape = (config.training_steps, config.hidden_size)
        self.time = nn.Parameter(torch.empty(shape)) if config.time_signal == "learned" else None
        self.halting = _HaltingProbability(config) if config.halting == "act" else None

    def forward(self, hidden_states: Tensor, run_pass: RunPass, rows: Rows) -> Tensor:
        steps = rows.context.options.num_steps
        if self.time is not None and steps > len(self.time):
            raise ValueError(
                f"num_steps {steps} is above {len(self.time)}, the steps that the model learned a time signal for: "
                "take at most these, or train with --universal-time-signal sinusoid"
            )
        if self.halting is not None:
            return self._halted(hidden_states, run_pass, rows, self.halting)
        return super().forward(hidden_states, run_pass, rows)

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        positions = sinusoid(rows.context.positions, self.config.hidden_size).to(state.dtype)
        return state + positions + self._time(step, state)

    def _time(self, step: int, like: Tensor) -> Tensor:
        if self.time is None:
            return sinusoid(torch.full((), float(step), device=like.device), like.size(-1)).to(like.dtype)
        return (self.time[step] * math.sqrt(like.size(-1))).to(like)

    def _halted(self, hidden_states: Tensor, run_pass: RunPass, rows: Rows, halting: nn.Module) -> Tensor:
        """Return the output of all positions. Those that have halted still take part in every pass."""

        def step(number: int, rows: Rows, *carried: Tensor) -> State:
            state, output, total, steps, remainder, halted = carried
            entering = self.enter(state, hidden_states, number, rows)
            probability = halting(entering)
            ends = ~halted & (total + probability > 1.0 - self.config.halting_epsilon)
            goes_on = (~halted & ~ends).float()
            weight = goes_on * probability + ends * (1.0 - total)
            remainder = remainder + ends * (1.0 - total)
            total, steps, halted = total + goes_on * probability, steps + ~halted, halted | ends
            state = run_pass(entering, number, rows)
            weight = weight.to(state.dtype)
            kept = output if self.config.halting_output == "accumulated" else (1.0 - weight) * output
            return state, kept + weight * state, total, steps, remainder, halted

        nothing = hidden_states.new_zeros((*hidden_states.shape[:-1], 1), dtype=torch.float32)
        first = (torch.zeros_like(hidden_states), nothing, nothing, nothing, nothing.bool())
        _, output, _, steps, remainder, _ = recur(step, (hidden_states, *first), rows, result=1)
        if self.training:
            cost, padding = steps + remainder, rows.context.padding
            if padding is None:
                cost = cost.mean()
            else:
                counted = ~padding[:, rows.memory.past :].unsqueeze(-1)
                cost = (cost * counted).sum() / counted.sum().clamp(min=1)
            rows.context.records.losses.append(self.config.ponder_coef * cost)
        return output


class UniversalLayer(SandwichLayer):
    """A layer with norms in front of its parts, or behind their residual sums as in the paper."""

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__(config, layer_idx, mlp)
        if config.post_norm:
            self.input_layernorm = self.post_attention_layernorm = nn.Identity()
        else:
            self.attention_output_norm = self.mlp_output_norm = nn.Identity()


class UniversalTransformer(System):
    """One group of layers of the original transformer."""

    layer_class = UniversalLayer
    loop_class = UniversalLoop
    scales_embeddings = True
    dense_bias = True
    fields = {  # noqa: RUF012
        "halting": Field(str, "act", "How positions end: each by itself, or none.", choices=("act", "none")),
        "halting_epsilon": Field(float, 0.01, _EPSILON, low=0.0, high=1.0),
        "halting_output": Field(str, "accumulated", _OUTPUT, choices=("accumulated", "basic")),
        "ponder_coef": Field(float, 0.01, "Coefficient of the mean of steps and remainder.", low=0.0),
        "time_signal": Field(str, "learned", "Signal of the pass.", choices=("learned", "sinusoid")),
        "training_steps": Field(int, 8, "Most passes in training; the rows of a learned time signal.", low=1),
        "post_norm": Field(bool, False, "Whether norms stand behind the residual sums."),
        "router_logit_ema": LOGIT_EMA,
    }

    def check(self, values: Mapping[str, Any]) -> None:
        steps, learned = values["mean_recurrence"], values["training_steps"]
        if values["time_signal"] == "learned" and steps > learned:
            raise ValueError(f"mean_recurrence {steps} is above training_steps {learned}, which have a time signal")

    def build_final_norm(self, config: Config) -> nn.Module:
        # A layer of the paper ends with its own.
        return nn.Identity() if config.post_norm else super().build_final_norm(config)


SYSTEM = UniversalTransformer()
