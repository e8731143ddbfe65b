"""Hugging Face to Megatron."""

import argparse
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import args_from_config, config_from_args
from more_megatron.hf.conversion.json_files import ARGS_FILE, read_args, read_config
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.megatron_writer import write_release
from more_megatron.hf.conversion.parameters import Source
from more_megatron.hf.conversion.safetensors_files import SafetensorsFolder
from more_megatron.hf.conversion.verification import compare_tensors
from more_megatron.hf.mapping import Entry, entries
from more_megatron.progress import progress_bar
from more_megatron.unfinished import unfinished_folder

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


def from_hf(
    load: Path, save: Path, *, dtype: str | None = None, verify: bool = False, progress: bool = True
) -> list[str]:
    """Convert a Hugging Face model of ours into a checkpoint that runs of any layout begin from; return what was done.

    Args:
        load: Folder of the Hugging Face model.
        save: Folder that runs will name with `--load`.
        dtype: Name of the dtype of the weights; None: that of the files.
        verify: Whether what was written is read again and compared.
        progress: Whether to draw a progress bar.

    Raises:
        MoREError: If the model or the place to write to is not as it must be. Nothing is left under the final name.
    """
    with unfinished_folder(save) as folder:
        config, form = read_config(load)
        files = SafetensorsFolder(load)
        source = Source(files, entries(config, form), dtype)
        files.check(source.entries, form.buffers(config))
        args = argparse.Namespace(**{**_DEFAULTS, **_arguments(load, config), **_OF_A_RELEASE})
        with progress_bar(len(source.entries), "parameter", "weights", progress) as bar:

            def read(entry: Entry) -> torch.Tensor:
                bar.update()
                return source.read(entry)

            write_release(folder, config, args, [(entry, source.dtype(entry)) for entry in source.entries], read)
        lines = [f"{save}: {config['variant']} of {load}, {source.parameters:,} parameters"]
        if verify:
            written = MegatronCheckpoint(folder)
            written.check(source.entries, config["num_hidden_layers"])
            lines.append(compare_tensors(load, source.entries, written.read, progress))
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
        described = config_from_args(argparse.Namespace(**stored))
    except MoREError as error:
        raise MoREError(
            f"{folder / ARGS_FILE} does not hold the arguments of a run ({error}): remove it, and they are derived "
            "from config.json"
        ) from error
    is_as_exported = all(config.get(name) == value for name, value in described.items())
    return stored if is_as_exported else {**stored, **derived}
