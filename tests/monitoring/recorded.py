"""What a run computes, kept by other ways than monitoring's, and figures worked out of it in plain PyTorch."""

import contextlib
import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import training

from more_megatron.monitoring import HEALTH_FILE
from tests.helpers.reuse import train_all

_LOOPS = (
    ("more_megatron.model.loops", "iterate_state"),
    ("more_megatron.model.loops", "iterate_residual"),
    ("more_megatron.blocks.recurrent_block", "iterate_state"),
    ("more_megatron.blocks.cell_experts", "iterate_residual"),
)


@dataclass
class Recorded:
    """What the last training step computed.

    Attributes:
        states: For each recurrence and micro-batch, in the order of computation, its states from the first, [rows, h].
        inputs: What is injected into each of them; None where nothing is.
        decisions: Logits and map of each routing decision, by layer.
        gradients: Gradient of each parameter, by name.
        parameters: Each parameter before the step, by name.
    """

    states: list[list[torch.Tensor]] = field(default_factory=list)
    decisions: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `--save` folder."""
    return [json.loads(line) for line in (folder / HEALTH_FILE).read_text().splitlines()]


def record_run(command_line: str) -> Recorded:
    """Train on one rank, and return what the last step computed."""
    recorded = Recorded()
    with contextlib.ExitStack() as stack:
        for module, name in _LOOPS:
            stack.enter_context(_replaced(importlib.import_module(module), name, _of_states(recorded)))
        stack.enter_context(_replaced(TopKRouter, "forward", _of_decisions(recorded)))
        stack.enter_context(_replaced(training, "train_step", _of_gradients(recorded)))
        train_all([command_line])
    return recorded


@contextlib.contextmanager
def _replaced(holder: Any, name: str, around: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, around(original))
    yield
    setattr(holder, name, original)


def _of_states(recorded: Recorded) -> Callable[[Any], Any]:
    def around(iterate: Callable[..., Any]) -> Callable[..., Any]:
        def iterate_and_keep(step: Callable[..., Any], state: torch.Tensor, *args: Any) -> torch.Tensor:
            states = [state.detach().flatten(0, -2)]
            recorded.states.append(states)

            def kept(*step_args: Any) -> Any:
                result = step(*step_args)
                new = result[0] if isinstance(result, tuple) else result
                states.append(new.detach().flatten(0, -2))
                return result

            return iterate(kept, state, *args)

        return iterate_and_keep

    return around


def _of_decisions(recorded: Recorded) -> Callable[[Any], Any]:
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_and_keep(router: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = forward(router, inputs, *args, **kwargs)
            logits = torch.nn.functional.linear(inputs.detach().float(), router.weight.detach().float())
            decision = (logits.flatten(0, 1), result[1].detach().bool())
            recorded.decisions[router.layer_number].append(decision)
            return result

        return forward_and_keep

    return around


def _of_gradients(recorded: Recorded) -> Callable[[Any], Any]:
    def around(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_keep(*args: Any, **kwargs: Any) -> Any:
            [model], optimizer = args[2], args[3]
            recorded.states.clear()
            recorded.decisions.clear()
            named = [(name.replace("module.", ""), parameter) for name, parameter in model.named_parameters()]
            recorded.parameters = {name: parameter.detach().clone() for name, parameter in named}
            step = optimizer.step

            def kept() -> Any:
                recorded.gradients = {name: parameter.main_grad.clone() for name, parameter in named}
                return step()

            optimizer.step = kept
            try:
                return train_step(*args, **kwargs)
            finally:
                del optimizer.step

        return step_and_keep

    return around


def expected_figures(recorded: Recorded, places: list[str], micro_batches: int) -> dict[str, float]:
    """Return what the figures of states and decisions must be, by tag, in float64.

    Args:
        recorded: The training step.
        places: Where each recurrence of a micro-batch is, in the order of computation.
        micro_batches: Micro-batches of the step.
    """
    figures = _of_routing(recorded)
    count = len(places)
    assert len(recorded.states) == count * micro_batches
    for index, place in enumerate(places):
        runs = recorded.states[index::count]
        states = [torch.cat(states).double() for states in zip(*runs, strict=True)]
        figures |= {f"recurrence/{place}/{name}": value for name, value in _of_states_over_steps(states).items()}
    return figures


def _of_states_over_steps(states: list[torch.Tensor]) -> dict[str, float]:
    rows, width = states[0].shape
    figures, moved = {}, []
    for step in range(1, len(states)):
        change = torch.stack([(states[step][row] - states[step - 1][row]).norm() for row in range(rows)])
        length = torch.stack([states[step][row].norm() for row in range(rows)])
        figures[f"state norm/step {step}"] = float((length / width**0.5).mean())
        figures[f"change/step {step}"] = float((change / width**0.5).mean())
        figures[f"relative change/step {step}"] = float((change / length).mean())
        moved.append(figures[f"change/step {step}"])
    last, before = states[-1], states[-2]
    figures["last step share"] = float(torch.linalg.matrix_norm(last - before) / torch.linalg.matrix_norm(last))
    figures["mean change"] = sum(moved[1:]) / len(moved[1:])
    # The slope of a line through two points.
    assert len(moved) == 3
    figures["change trend"] = moved[2] - moved[1]
    figures["second step"] = figures["relative change/step 2"]
    figures["steps"] = float(len(moved))
    centred = last - last.mean(dim=1, keepdim=True)
    cosines = torch.nn.functional.cosine_similarity(centred.unsqueeze(0), centred.unsqueeze(1), dim=-1)
    figures["token correlation"] = float(cosines[~torch.eye(rows, dtype=torch.bool)].mean())
    return figures


def _of_routing(recorded: Recorded) -> dict[str, float]:
    figures = {}
    for layer, decisions in recorded.decisions.items():
        steps = len(decisions) // 2
        by_step = [
            tuple(torch.cat([decisions[batch * steps + step][part] for batch in range(2)]) for part in range(2))
            for step in range(steps)
        ]
        for step, (logits, chosen) in enumerate(by_step):
            probabilities = logits.double().softmax(-1)
            load = probabilities.mean(0)
            tag = f"routing/layer {layer}/{{}}" + (f"/step {step + 1}" if steps > 1 else "")
            named = {
                "entropy": torch.distributions.Categorical(probs=probabilities).entropy().mean(),
                "largest probability": probabilities.max(dim=1).values.mean(),
                "load cv": load.std(correction=0) / load.mean(),
                "largest ratio": load.max() * len(load),
                "smallest ratio": load.min() * len(load),
                "effective experts": 1.0 / (load**2).sum(),
                "largest load": chosen.sum(0).max() / chosen.sum(),
                "dead experts": (chosen.sum(0) == 0).sum(),
            }
            if step > 0:
                named["expert change"] = (chosen != by_step[step - 1][1]).any(1).double().mean()
            figures |= {tag.format(name): float(value) for name, value in named.items()}
    return figures
