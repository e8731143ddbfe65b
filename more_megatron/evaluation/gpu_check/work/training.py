"""Stages c, d and f: short runs, resumed under the other backend, exported, in FP8, and under other layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoModelForCausalLM

from more_megatron.checkpoint_files import checkpoint_to_load
from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.work.tensors import sharded
from more_megatron.evaluation.runs import configure, fresh_model, train
from more_megatron.evaluation.step_benchmark import forward
from more_megatron.hf.conversion.export import ToHF, to_hf

__all__ = ["learn_and_hand_on", "learn_in_fp8", "save_losses", "under_layouts", "write_corpus"]

# How far losses after a resumption may be from those of the uninterrupted run: the other backend rounds otherwise.
_RESUMED = 0.02
# How much higher than in bf16 the loss in FP8 may be, in nats, where it still falls by a tenth in each step: on an H200
# recipes came out up to 0.18 lower and 0.16 higher.
_FP8_MARGIN = 0.3
# How far logits of an export may be from Megatron's in float32, and losses of a layout from those of a single rank.
_LOGITS, _LAYOUTS = 1e-3, 1e-4
# Losses at the end of a run that are averaged.
_LAST = 5


def write_corpus(prefix: str) -> Finding:
    """Write documents that count up in steps of 1 to 4: easy to learn."""
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(400):
        start, stride = random.integers(0, 126), random.integers(1, 5)
        builder.add_item(torch.from_numpy((start + stride * np.arange(80)) % 126))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Finding()


def learn_and_hand_on(flags: str, other: str, exact: str, folder: str, steps: int, fall: float) -> Finding:
    """Train, resume from half-way under the other backend, export, and compare the logits of the export.

    Args:
        flags: Command line of the run.
        other: The same under the other backend.
        exact: The same in float32.
        folder: For checkpoints and export.
        steps: Training steps.
        fall: By how many nats the loss must fall.
    """
    half = steps // 2
    checkpoints = f"{folder}/checkpoints"
    losses = _losses(f"{flags} --train-iters {steps} --save {checkpoints} --save-interval {half}")
    finding = Finding({"first": losses[0], "last": losses[-1]})
    _require_whole(finding, losses, steps)
    end = _mean_of_last(losses)
    finding.require(losses[0] - end >= fall, f"the loss fell from {losses[0]:.3f} to {end:.3f}, by less than {fall}")

    resumed = _losses(f"{other} --train-iters {steps} --load {checkpoints} --ckpt-step {half}")
    _require_whole(finding, resumed, steps - half)
    distance = max(abs(a - b) / abs(b) for a, b in zip(resumed, losses[half:], strict=False))
    finding.figures["resumed"] = distance
    finding.require(distance <= _RESUMED, f"losses under the other backend are {distance:.1e} away, over {_RESUMED}")

    distance = _export_distance(exact, Path(checkpoints), Path(folder, "export"))
    finding.figures["export"] = distance
    finding.require(distance <= _LOGITS, f"logits of the export are {distance:.1e} from Megatron's, over {_LOGITS}")
    return finding


def _losses(command_line: str) -> list[float]:
    return [iteration.loss for iteration in train(command_line)]


def _require_whole(finding: Finding, losses: list[float], steps: int) -> None:
    finding.require(len(losses) == steps, f"took {len(losses)} steps instead of {steps}")
    finding.require(all(map(math.isfinite, losses)), "a loss is not finite")


def _mean_of_last(losses: list[float]) -> float:
    return sum(losses[-_LAST:]) / len(losses[-_LAST:])


@torch.no_grad()
def _export_distance(flags: str, checkpoints: Path, export: Path) -> float:
    """Export the newest checkpoint and return how far its logits are from Megatron's, as a part of the largest."""
    to_hf(ToHF(load=checkpoints, save=export, dtype="float32", tokenizer=False, progress=False))
    args, model_config = configure(flags)
    model = fresh_model(model_config).eval()
    checkpoint = checkpoint_to_load(checkpoints, None)
    state = dist_checkpointing.load({"model": sharded(model)}, str(checkpoint))
    model.load_state_dict(state["model"], strict=True)
    device = torch.cuda.current_device()
    tokens = torch.arange(args.seq_length, device=device).mul(7).remainder(args.vocab_size).unsqueeze(0)
    ours = forward(model, tokens, None, None)
    theirs: Any = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    difference = (ours - theirs.to(device).eval()(tokens).logits).abs().max()
    return float(difference / ours.abs().max())


def learn_in_fp8(flags: str, recipes: dict[str, str], steps: int) -> Finding:
    """Train in bf16 and with each recipe of FP8, and compare where the losses come to.

    Args:
        flags: Command line of the run in bf16.
        recipes: Command line of each recipe.
        steps: Training steps.
    """
    end = _mean_of_last(_losses(f"{flags} --train-iters {steps}"))
    finding = Finding({"bf16": end})
    for name, command_line in recipes.items():
        try:
            losses = _losses(f"{command_line} --train-iters {steps}")
        except Exception as error:  # the other recipes are still to be tried
            finding.faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        _require_whole(finding, losses, steps)
        finding.figures[name] = _mean_of_last(losses)
        above = finding.figures[name] - end
        finding.require(above <= _FP8_MARGIN, f"{name} ends {above:.3f} nats above bf16, more than {_FP8_MARGIN}")
    return finding


def save_losses(flags: str, steps: int, folder: str) -> Finding:
    """Train on one rank, for layouts to be compared with: the checkpoint of the first step and the losses after it."""
    _losses(f"{flags} --train-iters {steps} --save {folder} --save-interval 1 --exit-interval 1")
    losses = _losses(f"{flags} --train-iters {steps} --load {folder} --ckpt-step 1")
    Path(folder, "losses.json").write_text(json.dumps(losses))
    return Finding({"losses": losses})


def under_layouts(layouts: dict[str, str], steps: int, folder: str) -> Finding:
    """Go on from the checkpoint under each layout and compare losses with those of one rank.

    Args:
        layouts: Command line of each layout.
        steps: Training steps.
        folder: Where `save_losses` has been.
    """
    finding = Finding()
    expected = json.loads(Path(folder, "losses.json").read_text())
    for name, command_line in layouts.items():
        losses = _losses(f"{command_line} --train-iters {steps} --load {folder} --ckpt-step 1")
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            continue  # The last rank prints.
        distance = max((abs(a - b) / b for a, b in zip(losses, expected, strict=True)), default=math.inf)
        finding.figures[name] = distance
        finding.require(distance <= _LAYOUTS, f"losses under {name} are {distance:.1e} away, more than {_LAYOUTS}")
    return finding
