"""Stages c, d and f: short runs, resumed under the other backend, exported, in FP8, and under other layouts."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoModelForCausalLM

from more_megatron.checkpoint_files import checkpoint_to_load
from more_megatron.evaluation.command_lines import Flags
from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.plan import EXACT, Plan, command_line
from more_megatron.evaluation.gpu_check.work.environment import fp8_obstacle
from more_megatron.evaluation.gpu_check.work.tensors import sharded
from more_megatron.evaluation.runs import configure, fresh_model, train
from more_megatron.evaluation.step_benchmark import forward
from more_megatron.hf.conversion.export import to_hf

# How far losses after a resumption may be from those of the uninterrupted run: the other backend rounds otherwise.
_RESUMED = 0.02
# How much higher than in bf16 the loss in FP8 may be, in nats, where it still falls by a tenth in each step: on an H200
# recipes came out up to 0.18 lower and 0.16 higher.
_FP8_MARGIN = 0.3
# How far logits of an export may be from Megatron's in float32, and losses of a layout from those of a single rank.
_LOGITS, _LAYOUTS = 1e-3, 1e-4
# Losses at the end of a run that are averaged.
_LAST = 5
_LAYOUT_STEPS = 4


def write_corpus(plan: Plan) -> Finding:
    """Write documents that count up in steps of 1 to 4: easy to learn."""
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{plan.corpus}.bin", dtype=np.uint16)
    for _ in range(400):
        start, stride = random.integers(0, 126), random.integers(1, 5)
        builder.add_item(torch.from_numpy((start + stride * np.arange(80)) % 126))
        builder.end_document()
    builder.finalize(f"{plan.corpus}.idx")
    return Finding()


def _line(plan: Plan, system: str, *flags: Flags) -> str:
    return command_line(system, plan.sizes.training, {"data-path": plan.corpus}, *flags)


def learn_and_hand_on(plan: Plan, system: str, backend: str) -> Finding:
    """Train, resume from half-way under the other backend, export, and compare the logits of the export."""
    steps, fall = plan.sizes.training_steps, plan.sizes.fall
    others = [name for name in plan.backends if name != backend] or [backend]
    own, other = (_line(plan, system, plan.backends[name]) for name in (backend, others[0]))
    folder = plan.folder / f"training-{system}-{backend}"
    half, checkpoints = steps // 2, folder / "checkpoints"
    losses = _losses(f"{own} --train-iters {steps} --save {checkpoints} --save-interval {half}")
    finding = Finding({"first": losses[0], "last": losses[-1]})
    _require_whole(finding, losses, steps)
    end = fmean(losses[-_LAST:])
    finding.require(losses[0] - end >= fall, f"the loss fell from {losses[0]:.3f} to {end:.3f}, by less than {fall}")

    resumed = _losses(f"{other} --train-iters {steps} --load {checkpoints} --ckpt-step {half}")
    _require_whole(finding, resumed, steps - half)
    distance = max(abs(a - b) / abs(b) for a, b in zip(resumed, losses[half:], strict=False))
    finding.figures["resumed"] = distance
    finding.require(distance <= _RESUMED, f"losses under the other backend are {distance:.1e} away, over {_RESUMED}")

    distance = _export_distance(_line(plan, system, EXACT), checkpoints, folder / "export")
    finding.figures["export"] = distance
    finding.require(distance <= _LOGITS, f"logits of the export are {distance:.1e} from Megatron's, over {_LOGITS}")
    return finding


def _losses(command_line: str) -> list[float]:
    return [iteration.loss for iteration in train(command_line)]


def _require_whole(finding: Finding, losses: list[float], steps: int) -> None:
    finding.require(len(losses) == steps, f"took {len(losses)} steps instead of {steps}")
    finding.require(all(map(math.isfinite, losses)), "a loss is not finite")


@torch.no_grad()
def _export_distance(flags: str, checkpoints: Path, export: Path) -> float:
    """Export the newest checkpoint and return how far its logits are from Megatron's, as a part of the largest."""
    to_hf(load=checkpoints, save=export, dtype="float32", tokenizer=False, progress=False)
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


def learn_in_fp8(plan: Plan, system: str) -> Finding:
    """Train in bf16 and with each recipe of FP8, and compare where the losses come to."""
    sizes = plan.sizes
    if obstacle := fp8_obstacle():
        return Finding(skipped=obstacle)

    def losses_with(recipe: Flags) -> list[float]:
        line = command_line(system, sizes.fp8, {"data-path": plan.corpus}, plan.best_backend, recipe)
        return _losses(f"{line} --train-iters {sizes.fp8_steps}")

    end = fmean(losses_with({})[-_LAST:])
    finding = Finding({"bf16": end})
    for name, recipe in plan.recipes.items():
        if obstacle := fp8_obstacle(name):
            finding.figures[name] = obstacle
            continue
        try:
            losses = losses_with(recipe)
        except Exception as error:  # the other recipes are still to be tried
            finding.faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        _require_whole(finding, losses, sizes.fp8_steps)
        finding.figures[name] = fmean(losses[-_LAST:])
        above = finding.figures[name] - end
        finding.require(above <= _FP8_MARGIN, f"{name} ends {above:.3f} nats above bf16, more than {_FP8_MARGIN}")
    return finding


def save_losses(plan: Plan, system: str) -> Finding:
    """Train on one rank, for layouts to be compared with: the checkpoint of the first step and the losses after it."""
    folder = _layouts_folder(plan, system)
    line = _layout_line(plan, system, {})
    _losses(f"{line} --save {folder} --save-interval 1 --exit-interval 1")
    losses = _losses(f"{line} --load {folder} --ckpt-step 1")
    (folder / "losses.json").write_text(json.dumps(losses))
    return Finding({"losses": losses})


def under_layout(plan: Plan, system: str, layout: str) -> Finding:
    """Go on from the checkpoint of `save_losses` under a layout and compare losses with those of one rank."""
    finding, folder = Finding(), _layouts_folder(plan, system)
    expected = json.loads((folder / "losses.json").read_text())
    losses = _losses(f"{_layout_line(plan, system, plan.layouts[layout])} --load {folder} --ckpt-step 1")
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # The last rank prints.
        distance = max((abs(a - b) / b for a, b in zip(losses, expected, strict=True)), default=math.inf)
        finding.figures["distance"] = distance
        finding.require(distance <= _LAYOUTS, f"losses are {distance:.1e} away, more than {_LAYOUTS}")
    return finding


def _layout_line(plan: Plan, system: str, layout: Flags) -> str:
    return f"{_line(plan, system, EXACT, plan.shared_batch, layout)} --train-iters {_LAYOUT_STEPS}"


def _layouts_folder(plan: Plan, system: str) -> Path:
    return plan.folder / f"layouts-{system}"
