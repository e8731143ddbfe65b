"""What the states of a model do over the steps, as it reads a text: movement, path independence, loss against depth."""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from more_megatron.errors import MoREError
from more_megatron.evaluation.analysis.recurrence_figures import draw_recurrence
from more_megatron.evaluation.analysis.trajectories import KINDS, Trajectories, distances_of_starts
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.evaluation.texts import read_texts, token_windows
from more_megatron.figures import spread, write_results
from more_megatron.flags import check_ranges

_MOST_STEPS = 64
_SHOWN = 12
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def analyze_recurrence(args: argparse.Namespace) -> list[str]:
    """Read the beginning of a text with a model, write what its states do, and return what was found, in lines.

    The arguments are the flags of `tools/analyze.py recurrence`.

    Raises:
        MoREError: If the model has no recurrence, or model or text cannot be read.
    """
    check_ranges(args, {"max_tokens": "[2, inf)", "initial_states": "[1, 1000]"})
    texts = read_texts(args.text)
    with open_model(args) as exported:
        if not exported.recurrent:
            raise MoREError(f"the model {exported.source} has no recurrence: there are no states to follow")
        length = min(args.max_tokens, exported.length)
        window = next(token_windows(exported.tokenizer, texts, length, length))
        steps = _most_steps(exported) if args.num_steps is None else args.num_steps
        exported.call_options(steps)
        report = _Reading(exported, window, steps).report(args.initial_states)
    report = {"model": str(exported.source), "text": str(args.text), **report}
    content = json.dumps(report, indent=1) + "\n"
    return [*_lines(report), write_results(args.output, {"recurrence.json": content}, draw_recurrence(report))]


def _most_steps(exported: ExportedModel) -> int:
    """Return the steps that are followed: 64, or as many as a model with a learned time signal has."""
    try:
        exported.call_options(_MOST_STEPS)
    except MoREError:
        return int(getattr(exported.model.config, "training_steps", exported.model.config.mean_recurrence))
    return _MOST_STEPS


@dataclass(frozen=True)
class _Reading:
    """One window of a text, read by one model."""

    exported: ExportedModel
    window: list[int]
    steps: int

    def report(self, initial_states: int) -> dict[str, Any]:
        """Return all figures; states follow from so many initial states where the model has some."""
        states, _ = self._states(None)
        return {
            "tokens": [self.exported.tokenizer.decode([token]) for token in self.window],
            "num_steps": self.steps,
            "trained_steps": int(self.exported.model.config.mean_recurrence),
            "recurrences": [self._movement(number, Trajectories(part)) for number, part in enumerate(states, start=1)],
            "path_independence": self._path_independence(initial_states),
            "depths": self._depths(),
        }

    @torch.no_grad()
    def _call(self, **options: Any) -> Any:
        tokens = torch.tensor([self.window], device=self.exported.model.device)
        return self.exported.model(tokens, use_cache=False, **options)

    def _states(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the states, float32 [recurrences, steps, tokens, h], and the token that each position predicts."""
        options = {} if start is None else {"input_states": start}
        output = self._call(num_steps=self.steps, output_recurrent_states=True, **options)
        return output.recurrent_states[:, :, 0].float().cpu(), output.logits[0].argmax(-1).cpu()

    def _movement(self, number: int, found: Trajectories) -> dict[str, Any]:
        kinds, distances = found.kinds(), found.distances()
        plane, variance = found.plane()
        counts = None if kinds is None else {kind: kinds.count(kind) for kind in KINDS}
        return {
            "recurrence": number,
            "kinds": kinds,
            "counts": counts,
            "distance_to_last": distances.T.round(6).tolist(),
            "explained_variance": variance,
            "plane": {token: plane[:, token].round(5).tolist() for token in _shown(kinds, len(self.window))},
        }

    def _path_independence(self, number: int) -> dict[str, Any] | None:
        """Return how far apart states from several random initial states are; None where there is but one start."""
        model = self.exported.model
        recurrences = model.system.num_states(model.config)
        if recurrences == 0 or number < 2:
            return None
        generator = torch.Generator().manual_seed(0)
        shape = (recurrences, 1, len(self.window), model.config.hidden_size)
        runs = []
        for _ in range(number):
            start = torch.randn(shape, generator=generator) * model.config.state_std
            runs.append(self._states(start.to(model.device, model.dtype)))
        by_recurrence = torch.stack([states for states, _ in runs], dim=1)
        predicted = torch.stack([tokens for _, tokens in runs])
        return {
            "initial_states": number,
            "distance": [distances_of_starts(states).tolist() for states in by_recurrence],
            "same_prediction": float((predicted == predicted[0]).all(0).float().mean()),
        }

    def _depths(self) -> list[dict[str, Any]]:
        """Return loss and predictions at several depths, up to the steps that are followed."""
        depths = sorted({*(depth for depth in _DEPTHS if depth < self.steps), self.steps})
        targets = torch.tensor(self.window[1:])
        logs = {depth: self._call(num_steps=depth).logits[0].float().cpu().log_softmax(-1) for depth in depths}
        last = logs[self.steps]
        found = []
        for depth, log in logs.items():
            predicted = log.argmax(-1)
            found.append(
                {
                    "num_steps": depth,
                    "loss": float(torch.nn.functional.nll_loss(log[:-1], targets)),
                    "same_prediction_as_last": float((predicted == last.argmax(-1)).float().mean()),
                    "divergence_from_last": float((last.exp() * (last - log)).sum(-1).mean()),
                    "predictions": [self.exported.tokenizer.decode([token]) for token in predicted.tolist()],
                }
            )
        return found


def _shown(kinds: list[str] | None, tokens: int) -> list[int]:
    """Return the tokens whose ways are drawn: some of each kind, spread over the text."""
    groups = [list(range(tokens))]
    if kinds is not None:
        groups = [[token for token, own in enumerate(kinds) if own == kind] for kind in KINDS]
    groups = [group for group in groups if group]
    shown: list[int] = []
    for group in groups:
        shown += spread(group, _SHOWN // len(groups))
    return sorted(shown)


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{len(report['tokens'])} tokens, {report['num_steps']} steps, trained at {report['trained_steps']}"]
    for found in report["recurrences"]:
        counts = found["counts"] or {}
        words = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "too few steps to name the movement"
        lines.append(f"recurrence {found['recurrence']}: {words}")
    independence = report["path_independence"]
    if independence is not None:
        worst = max(distances[-1] for distances in independence["distance"])
        lines.append(
            f"{independence['initial_states']} initial states end at most {worst:.3g} state lengths apart; "
            f"{independence['same_prediction']:.1%} of predictions agree"
        )
    lines.append("    r    loss  same prediction as at the last")
    lines += [
        f"{depth['num_steps']:5}  {depth['loss']:.4f}  {depth['same_prediction_as_last']:.3f}"
        for depth in report["depths"]
    ]
    return lines
