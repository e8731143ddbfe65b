"""Megatron to Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import config_from_args
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.model_card import model_card
from more_megatron.hf.conversion.parameters import Source
from more_megatron.hf.conversion.safetensors_files import Group, plan_files, write_files
from more_megatron.hf.conversion.stored_args import write_args
from more_megatron.hf.conversion.tokenizer_files import ExportedTokenizer, plan_tokenizer
from more_megatron.hf.conversion.verification import compare_logits, compare_tensors
from more_megatron.hf.exported.system import write_code
from more_megatron.hf.mapping import entries
from more_megatron.progress import progress_bar
from more_megatron.systems.forms import Form, find_form
from more_megatron.unfinished import unfinished_folder

__all__ = ["ToHF", "to_hf"]

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ToHF:
    """What is exported, where to and how."""

    load: Path  # folder that a run saved to
    save: Path  # folder of the Hugging Face model
    step: int | None = None  # iteration of the checkpoint; None: the newest
    dtype: str | None = None  # name of the dtype of the weights; None: that of the checkpoint
    max_shard_size: int = 5 * 10**9  # largest size of a weights file in bytes
    tokenizer: bool = True  # whether the tokenizer is exported
    tokenizer_model: str | None = None  # where the tokenizer is now; None: where it was
    trust_remote_code: bool = False  # whether the tokenizer may run code of its own
    verify: bool = False  # whether what was written is read again and compared
    progress: bool = True  # whether to draw a progress bar
    form: str | None = None  # name of the published form to write; None: ours


def to_hf(job: ToHF) -> list[str]:
    """Convert a checkpoint into a folder that `from_pretrained` reads, and return what was done, in lines.

    Raises:
        MoREError: If the checkpoint, the tokenizer or the place to write to is not as it must be. Nothing is left
            under the final name.
    """
    with unfinished_folder(job.save) as folder:
        model = _Model(job)
        checkpoint, source, config = model.checkpoint, model.source, model.config
        tokenizer = None
        if job.tokenizer:
            tokenizer = plan_tokenizer(
                checkpoint.args, config["vocab_size"], job.tokenizer_model, job.trust_remote_code
            )
        _write_weights(folder, model, job)
        _write_texts(folder, model, tokenizer)
        if tokenizer is not None and tokenizer.write is not None:
            tokenizer.write(folder)
        lines = [f"{job.save}: {config['variant']} of {checkpoint.path}, {source.parameters:,} parameters"]
        if job.verify:
            lines.append(compare_tensors(folder, source.entries, source.read, job.progress))
            if model.form is None:
                lines.append(compare_logits(folder, checkpoint, source.entries, source.rounded))
    return lines


class _Model:
    """A checkpoint and what is written of it."""

    def __init__(self, job: ToHF) -> None:
        self.checkpoint = MegatronCheckpoint(job.load, job.step)
        shapes = self.checkpoint.shapes()
        if _EMBEDDING not in shapes:
            raise MoREError(f"checkpoint {self.checkpoint.path} lacks the parameter {_EMBEDDING}")
        try:
            self.config = config_from_args(self.checkpoint.args, shapes[_EMBEDDING][0])
        except MoREError as error:
            raise MoREError(f"the arguments in checkpoint {self.checkpoint.path}: {error}") from error
        self.form = None if job.form is None else find_form(job.form)
        if self.form is not None:
            _check_form(self.form, self.config)
        self.source = Source(self.checkpoint, entries(self.config, self.form), job.dtype)
        self.checkpoint.check(self.source.entries, self.config["num_hidden_layers"])
        self.config["dtype"] = str(self.source.dtype(self.source.entries[0])).removeprefix("torch.")


def _check_form(form: Form, config: dict[str, Any]) -> None:
    if config["variant"] != form.system:
        raise MoREError(f"--format {form.name} is one of {form.system}, and the checkpoint is of {config['variant']}")
    for fault in form.faults(config):
        raise MoREError(f"--format {form.name} cannot hold this model: {fault}; leave the flag out")


def _write_weights(folder: Path, model: _Model, job: ToHF) -> None:
    source = model.source
    groups = [Group(entry.names, entry.shapes, source.dtype(entry)) for entry in source.entries]
    by_name = {entry.names: entry for entry in source.entries}
    buffers = {} if model.form is None else model.form.buffers(model.config)
    groups += [Group((name,), (tuple(buffer.shape),), buffer.dtype) for name, buffer in buffers.items()]
    with progress_bar(sum(group.size for group in groups), "B", "weights", job.progress) as bar:

        def read(group: Group) -> Sequence[torch.Tensor]:
            bar.update(group.size)
            if group.names not in by_name:
                return [buffers[name] for name in group.names]
            entry = by_name[group.names]
            return entry.split(source.read(entry))

        write_files(folder, plan_files(groups, job.max_shard_size), read)


def _write_texts(folder: Path, model: _Model, tokenizer: ExportedTokenizer | None) -> None:
    args, form, config = model.checkpoint.args, model.form, model.config
    ids = {}
    if tokenizer is not None:
        found = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
        ids = {name: token for name, token in found.items() if token is not None}
    _write_json(folder / "config.json", {**(config if form is None else form.to_form(config, args)), **ids})
    _write_json(folder / "generation_config.json", ids)
    write_args(folder, args)
    has_tokenizer = tokenizer is not None and tokenizer.write is not None
    note = None if form is None else form.note
    card = model_card(config, args, model.checkpoint.iteration, model.source.parameters, has_tokenizer, note)
    (folder / "README.md").write_text(card)
    if form is None:
        write_code(folder, config["variant"])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
