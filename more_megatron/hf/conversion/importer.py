"""Hugging Face to Megatron."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import args_from_config, config_from_args
from more_megatron.hf.conversion.config_file import read_config
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.megatron_writer import write_release
from more_megatron.hf.conversion.parameters import Source
from more_megatron.hf.conversion.safetensors_files import SafetensorsFolder
from more_megatron.hf.conversion.stored_args import args_path, read_args
from more_megatron.hf.conversion.verification import compare_tensors
from more_megatron.hf.mapping import Entry, entries
from more_megatron.progress import progress_bar
from more_megatron.unfinished import unfinished_folder

__all__ = ["FromHF", "from_hf"]

# The checkpoint holds no optimizer and no random state, and begins a run.
_OF_A_RELEASE = {
    "no_save_optim": True,
    "no_save_rng": True,
    "iteration": 0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "ckpt_format": "torch_dist",
    "add_position_embedding": True,
}
_DEFAULTS = {"quick_geglu": False, "squared_relu": False, "moe_router_load_balancing_type": "aux_loss"}


@dataclass(frozen=True)
class FromHF:
    """What is imported, where to and how."""

    load: Path  # folder of the Hugging Face model
    save: Path  # folder that runs will name with `--load`
    dtype: str | None = None  # name of the dtype of the weights; None: that of the files
    verify: bool = False  # whether what was written is read again and compared
    progress: bool = True  # whether to draw a progress bar


def from_hf(job: FromHF) -> list[str]:
    """Convert a Hugging Face model of ours into a checkpoint that runs of any layout begin from; return what was done.

    Raises:
        MoREError: If the model or the place to write to is not as it must be. Nothing is left under the final name.
    """
    with unfinished_folder(job.save) as folder:
        config, form = read_config(job.load)
        files = SafetensorsFolder(job.load)
        source = Source(files, entries(config, form), job.dtype)
        files.check(source.entries, () if form is None else form.buffers(config))
        args = argparse.Namespace(**{**_DEFAULTS, **_arguments(job.load, config), **_OF_A_RELEASE})
        with progress_bar(len(source.entries), "parameter", "weights", job.progress) as bar:

            def read(entry: Entry) -> torch.Tensor:
                bar.update()
                return source.read(entry)

            write_release(folder, config, args, [(entry, source.dtype(entry)) for entry in source.entries], read)
        lines = [f"{job.save}: {config['variant']} of {job.load}, {source.parameters:,} parameters"]
        if job.verify:
            written = MegatronCheckpoint(folder)
            written.check(source.entries, config["num_hidden_layers"])
            lines.append(compare_tensors(job.load, source.entries, written.read, job.progress))
    return lines


def _arguments(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run that a model was exported from, or those that its configuration stands for.

    Raises:
        MoREError: If Megatron cannot express the model, or the arguments are not those of a run.
    """
    derived, stored = args_from_config(config), read_args(folder)
    if not stored:
        return derived
    try:
        described = config_from_args(argparse.Namespace(**stored), config["vocab_size"])
    except MoREError as error:
        raise MoREError(
            f"{args_path(folder)} does not hold the arguments of a run ({error}): remove it, and they are derived from "
            "config.json"
        ) from error
    return stored if all(config.get(name) == value for name, value in described.items()) else {**stored, **derived}
