"""Hugging Face to Megatron."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import args_from_config, config_from_args
from more_megatron.hf.conversion.config_file import read_config
from more_megatron.hf.conversion.export import DTYPES
from more_megatron.hf.conversion.finite import cast_finite
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.megatron_writer import write_release
from more_megatron.hf.conversion.safetensors_files import SafetensorsFolder
from more_megatron.hf.conversion.stored_args import args_path, read_args
from more_megatron.hf.conversion.verification import compare_tensors
from more_megatron.hf.mapping import Entry, entries
from more_megatron.progress import progress_bar
from more_megatron.systems.export import Layout
from more_megatron.unfinished import unfinished_folder

__all__ = ["FromHF", "from_hf"]

_SHOWN = 3
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
    """What is imported, where to and how.

    Attributes:
        load: Folder of the Hugging Face model.
        save: Folder that runs will name with `--load`.
        dtype: Name of the dtype of the weights; None: that of the files.
        verify: Whether what was written is read again and compared.
        progress: Whether to draw a progress bar.
    """

    load: Path
    save: Path
    dtype: str | None = None
    verify: bool = False
    progress: bool = True


def from_hf(job: FromHF) -> list[str]:
    """Convert a Hugging Face model of ours into a checkpoint that runs of any layout begin from.

    Args:
        job: What, where to and how.

    Returns:
        What was done, in lines.

    Raises:
        MoREError: If the model or the place to write to is not as it must be. Nothing is left under the final name.
    """
    with unfinished_folder(job.save) as folder:
        source = _Source(job.load, job.dtype)
        args = argparse.Namespace(**{**_DEFAULTS, **_arguments(job.load, source.config), **_OF_A_RELEASE})
        with progress_bar(len(source.entries), "parameter", "weights", job.progress) as bar:

            def read(entry: Entry) -> torch.Tensor:
                bar.update()
                return source.read(entry)

            write_release(folder, source.config, args, [(entry, source.dtype(entry)) for entry in source.entries], read)
        parameters = sum(prod(entry.shape) for entry in source.entries)
        lines = [f"{job.save}: {source.config['variant']} of {job.load}, {parameters:,} parameters"]
        if job.verify:
            written = MegatronCheckpoint(folder)
            written.check(source.entries, source.config["num_hidden_layers"])
            lines.append(compare_tensors(job.load, source.entries, written.read, job.progress))
    return lines


class _Source:
    """The parameters of a Hugging Face folder."""

    def __init__(self, folder: Path, dtype: str | None) -> None:
        self.config, self._form = read_config(folder)
        self.entries = entries(self.config, self._form)
        self._files = SafetensorsFolder(folder)
        self._dtype = DTYPES[dtype] if dtype is not None else None
        self._check(folder)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a parameter in the checkpoint."""
        if entry.fp32:
            return torch.float32
        return self._dtype or self._files.dtype(self._names(entry)[0])

    def read(self, entry: Entry) -> torch.Tensor:
        """Return a parameter in Megatron's layout.

        Raises:
            MoREError: If it is not finite.
        """
        merged = entry.merge([self._files.read(name) for name in self._names(entry)])
        return cast_finite(merged, self.dtype(entry), f"{entry.names[0]} of {self._files.folder}")

    def _names(self, entry: Entry) -> tuple[str, ...]:
        """Return the names that a parameter has in the folder: one is enough where it may stand twice."""
        if entry.layout is not Layout.TWICE:
            return entry.names
        return tuple(name for name in entry.names if name in self._files.names) or entry.names

    def _check(self, folder: Path) -> None:
        shapes = {name: entry.shapes[0] for entry in self.entries for name in self._names(entry)}
        shapes |= {
            name: shape
            for entry in self.entries
            if entry.layout is not Layout.TWICE
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        }
        for name, shape in shapes.items():
            if name not in self._files.names:
                raise MoREError(f"{folder} lacks the parameter {name}, which its config.json asks for")
            if self._files.shape(name) != shape:
                found = list(self._files.shape(name))
                raise MoREError(f"{folder} holds {name} in shape {found} instead of {list(shape)}")
        buffers = set() if self._form is None else set(self._form.buffers(self.config))
        unknown = sorted(self._files.names - set(shapes) - buffers)
        if unknown:
            names = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
            raise MoREError(f"{folder} holds parameters that the mapping has no row for: {names}")


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
