"""Checks of the checkpoint a run is about to load, before any rank starts to."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.training import training

from more_megatron.config import flag
from more_megatron.errors import MoREError

__all__ = ["check_checkpoint", "newest_complete_iteration", "refuse_unreadable_checkpoints"]

_TRACKER = "latest_checkpointed_iteration.txt"

# Arguments that decide which tensors a model has, and of which shape.
_ARCHITECTURE = (
    "more_variant",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "ffn_hidden_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "normalization",
    "position_embedding_type",
    "swiglu",
    "add_bias_linear",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "vocab_size",
)


def check_checkpoint(args: argparse.Namespace) -> None:
    """Check the checkpoint that `--load` names, if there is one.

    A tracker file that a kill left empty is written anew: it names the newest complete checkpoint again.

    Args:
        args: Validated arguments.

    Raises:
        MoREError: If the checkpoint is damaged or incomplete, or is one of another architecture.
    """
    if args.load is None or args.ckpt_format != "torch_dist" or not Path(args.load, _TRACKER).is_file():
        return
    folder = Path(args.load)
    if args.ckpt_step is None:
        _repair_tracker(folder, write=args.rank == 0)
    checkpoint = _checkpoint_to_load(folder, args.ckpt_step)
    fault = _fault(checkpoint)
    if fault is not None:
        complete = newest_complete_iteration(folder)
        remedy = (
            "there is no complete one beside it"
            if complete is None
            else f"--ckpt-step {complete} loads the newest complete one"
        )
        raise MoREError(f"checkpoint {checkpoint} is damaged: {fault}; {remedy}")
    _check_architecture(checkpoint, args)


def newest_complete_iteration(folder: Path) -> int | None:
    """Return the iteration of the newest complete checkpoint in a `--save` folder, None if there is none."""
    iterations = sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*") if path.is_dir())
    for iteration in reversed(iterations):
        if _fault(_iteration_folder(folder, iteration)) is None:
            return iteration
    return None


def refuse_unreadable_checkpoints() -> None:
    """Make `pretrain` end with one line where Megatron cannot read the checkpoint that it loads."""
    training.load_checkpoint = _one_line_on_failure(training.load_checkpoint)


def _one_line_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except Exception as error:
            name = type(error).__name__
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            detail = lines[-1] if lines else "no further message"
            raise MoREError(
                f"the checkpoint in {training.get_args().load} cannot be loaded: {name}: {detail}; "
                "load an older one with --ckpt-step, or MORE_TRACEBACK=1 shows where it failed"
            ) from error

    return load_checkpoint


def _iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def _read_tracker(folder: Path) -> str:
    return (folder / _TRACKER).read_text(errors="replace").strip()


def _checkpoint_to_load(folder: Path, step: int | None) -> Path:
    if step is not None:
        return _iteration_folder(folder, step)
    entry = _read_tracker(folder)
    return folder / "release" if entry == "release" else _iteration_folder(folder, int(entry))


def _repair_tracker(folder: Path, write: bool) -> None:
    entry = _read_tracker(folder)
    if entry == "release" or entry.isdecimal():
        return
    complete = newest_complete_iteration(folder)
    if complete is None:
        raise MoREError(
            f"{folder / _TRACKER} is damaged and there is no complete checkpoint beside it: "
            "load another folder, or remove the file to start anew"
        )
    if write:
        print(
            f"> {folder / _TRACKER} is damaged; continuing from the newest complete checkpoint, {complete}", flush=True
        )
    # Every rank writes the same line; a rename leaves no moment at which a reader sees half of it.
    temporary = folder / f".{_TRACKER}.{os.getpid()}"
    temporary.write_text(str(complete))
    temporary.replace(folder / _TRACKER)


def _fault(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, None if they are all there and whole."""
    if not checkpoint.is_dir():
        return "the folder does not exist"
    try:
        json.loads((checkpoint / "metadata.json").read_text())
    except (OSError, ValueError):
        return "metadata.json is missing or not JSON, as after a save that did not finish"
    try:
        with open(checkpoint / ".metadata", "rb") as file:
            metadata = pickle.load(file)
    except Exception:  # whatever a damaged pickle raises
        return ".metadata is missing or cannot be read"
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)"
    return None


def _check_architecture(checkpoint: Path, args: argparse.Namespace) -> None:
    try:
        saved = load_common_state_dict(str(checkpoint)).get("args")
    except Exception as error:  # whatever damaged content raises
        raise MoREError(f"checkpoint {checkpoint} is damaged: its arguments cannot be read ({error})") from error
    if saved is None:
        return
    for name in _ARCHITECTURE:
        if not hasattr(saved, name) or (name == "more_variant" and args.finetune):
            continue
        was, now = getattr(saved, name), getattr(args, name)
        if was != now:
            raise MoREError(
                f"checkpoint {checkpoint} is of another architecture: {flag(name)} was {was} and is {now} now; "
                "give it the former value or another --load"
            )
