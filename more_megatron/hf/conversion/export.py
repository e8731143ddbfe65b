"""Megatron to Hugging Face."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import config_from_args
from more_megatron.hf.conversion.json_files import write_args
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.model_card import model_card
from more_megatron.hf.conversion.parameters import Source
from more_megatron.hf.conversion.safetensors_files import write_files
from more_megatron.hf.conversion.tokenizer_files import ExportedTokenizer, plan_tokenizer
from more_megatron.hf.conversion.verification import compare_logits, compare_tensors
from more_megatron.hf.exported.system import write_code
from more_megatron.hf.mapping import Entry, entries
from more_megatron.progress import progress_bar
from more_megatron.systems.forms import OURS, Form, forms
from more_megatron.unfinished import unfinished_folder


def to_hf(
    load: Path,
    save: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    form: str = OURS.name,
    tokenizer: bool = True,
    tokenizer_model: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    progress: bool = True,
) -> list[str]:
    """Convert a checkpoint into a folder that `from_pretrained` reads, and return what was done, in lines.

    Args:
        load: Folder that a run saved to.
        save: Folder of the Hugging Face model.
        step: Iteration of the checkpoint; None: the newest.
        dtype: Name of the dtype of the weights; None: that of the checkpoint.
        max_shard_size: Largest size of a weights file, in bytes.
        form: Name of the form to write: ours, or a published one.
        tokenizer: Whether the tokenizer is exported.
        tokenizer_model: Where the tokenizer is now; None: where it was.
        trust_remote_code: Whether the tokenizer may run code of its own.
        verify: Whether what was written is read again and compared.
        progress: Whether to draw a progress bar.

    Raises:
        MoREError: If the checkpoint, the tokenizer or the place to write to is not as it must be. Nothing is left
            under the final name.
    """
    with unfinished_folder(save) as folder:
        checkpoint = MegatronCheckpoint(load, step)
        config = _config(checkpoint)
        written = _form(form, config)
        source = Source(checkpoint, entries(config, written), dtype)
        checkpoint.check(source.entries, config["num_hidden_layers"])
        config["dtype"] = str(source.dtype(source.entries[0])).removeprefix("torch.")
        planned = ExportedTokenizer()
        if tokenizer:
            planned = plan_tokenizer(checkpoint.args, config["vocab_size"], tokenizer_model, trust_remote_code)
        _write_weights(folder, source, written.buffers(config), max_shard_size, progress)
        _write_texts(folder, checkpoint, config, written, planned, source.parameters)
        lines = [f"{save}: {config['variant']} of {checkpoint.path}, {source.parameters:,} parameters"]
        if verify:
            lines.append(compare_tensors(folder, source.entries, source.read, progress))
            if written is OURS:
                lines.append(compare_logits(folder, checkpoint, source.entries, source.rounded))
    return lines


def _config(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    try:
        return config_from_args(checkpoint.args)
    except MoREError as error:
        raise MoREError(f"the arguments in checkpoint {checkpoint.path}: {error}") from error


def _form(name: str, config: dict[str, Any]) -> Form:
    if name not in forms():
        raise MoREError(f"--format {name} does not exist: choose one of {', '.join(forms())}")
    form = forms()[name]
    if form.system not in (None, config["variant"]):
        raise MoREError(f"--format {name} is one of {form.system}, and the checkpoint is of {config['variant']}")
    for fault in form.faults(config):
        raise MoREError(f"--format {name} cannot hold this model: {fault}; leave the flag out")
    return form


def _write_weights(
    folder: Path, source: Source, buffers: Mapping[str, torch.Tensor], max_shard_size: int, progress: bool
) -> None:
    places = {name: (entry, part) for entry in source.entries for part, name in enumerate(entry.names)}
    tensors = {
        name: torch.empty(entry.shapes[part], dtype=source.dtype(entry), device="meta")
        for name, (entry, part) in places.items()
    }
    tensors |= {name: buffer.to("meta") for name, buffer in buffers.items()}

    @functools.lru_cache(maxsize=1)  # The parts of a parameter follow each other.
    def split(entry: Entry) -> list[torch.Tensor]:
        return entry.split(source.read(entry))

    with progress_bar(sum(tensor.nbytes for tensor in tensors.values()), "B", "weights", progress) as bar:

        def read(name: str) -> torch.Tensor:
            bar.update(tensors[name].nbytes)
            if name in buffers:
                return buffers[name]
            entry, part = places[name]
            return split(entry)[part]

        write_files(folder, tensors, read, max_shard_size)


def _write_texts(
    folder: Path,
    checkpoint: MegatronCheckpoint,
    config: dict[str, Any],
    form: Form,
    tokenizer: ExportedTokenizer,
    parameters: int,
) -> None:
    args = checkpoint.args
    found = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: token for name, token in found.items() if token is not None}
    for name, content in (("config.json", {**form.to_form(config, args), **ids}), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_args(folder, args)
    card = model_card(config, args, checkpoint.iteration, parameters, tokenizer.write is not None, form.note)
    (folder / "README.md").write_text(card)
    if form is OURS:
        write_code(folder, config["variant"])
    if tokenizer.write is not None:
        tokenizer.write(folder)
