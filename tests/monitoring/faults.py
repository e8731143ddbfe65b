"""Faults planted into training runs, each at the third step of a process unless it says otherwise."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from megatron.training import get_args, training

from more_megatron.errors import MoREError
from more_megatron.evaluation.runs import forget_run
from more_megatron.training import forward
from tests.helpers.reuse import train_all

SPIKE = 14
_STEP = 3
_PUSH = 20.0


def faulty_run(command_line: str, fault: str) -> str | None:
    """Train with a fault, and return the error that ended the run; None if it came to its end."""
    with contextlib.ExitStack() as stack:
        FAULTS[fault](stack)
        try:
            train_all([command_line])
        except MoREError as error:
            forget_run()
            return str(error)
    return None


def _patched(stack: contextlib.ExitStack, holder: Any, name: str, replacement: Any) -> None:
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, replacement)


def _spoiling(act: Callable[[dict[str, torch.nn.Parameter], Any], None]) -> Callable[[contextlib.ExitStack], None]:
    """Return what lets `act` change the model, its parameters by name, before the third step."""

    def plant(stack: contextlib.ExitStack) -> None:
        original = training.train_step

        def train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
            if iteration + 1 == _STEP:
                [model] = args[2]
                with torch.no_grad():
                    named = {name.replace("module.", ""): value for name, value in model.named_parameters()}
                    act(named, unwrap_model(model))
            return original(*args, iteration=iteration, **kwargs)

        _patched(stack, training, "train_step", train_step)

    return plant


def _ignore_state(parameters: dict[str, torch.nn.Parameter], model: Any) -> None:
    [adapter] = [value for name, value in parameters.items() if name.endswith("adapter")]
    adapter[:, : adapter.size(0)] = 0.0


def _make_tokens_alike(parameters: dict[str, torch.nn.Parameter], model: Any) -> None:
    embedding = parameters["embedding.word_embeddings.weight"]
    embedding.copy_(embedding[:1].expand_as(embedding))
    model.config.recurrence_state_std = 0.0


def _spoil_expert(parameters: dict[str, torch.nn.Parameter], model: Any) -> None:
    weight = next(value for name, value in parameters.items() if "layers.1.mlp.experts" in name)
    weight[2, 0, 0] = float("nan")


def _pushing(expert: int, by: float) -> Callable[[contextlib.ExitStack], None]:
    """Return what pushes the logits of an expert in the second layer."""

    def plant(stack: contextlib.ExitStack) -> None:
        original = TopKRouter.gating

        def gating(router: Any, *args: Any) -> torch.Tensor:
            logits = original(router, *args)
            if router.layer_number == 2 and get_args().curr_iteration + 1 >= _STEP:
                logits = logits + by * torch.nn.functional.one_hot(torch.tensor(expert), logits.size(-1))
            return logits

        _patched(stack, TopKRouter, "gating", gating)

    return plant


def _corrupt_batch(stack: contextlib.ExitStack) -> None:
    """Ask for tokens that never occur, at one step."""
    original = forward.next_batch

    def next_batch(*args: Any) -> Any:
        batch = original(*args)
        if get_args().curr_iteration + 1 == SPIKE:
            batch = dataclasses.replace(batch, labels=batch.labels + 60)
        return batch

    _patched(stack, forward, "next_batch", next_batch)


FAULTS: dict[str, Callable[[contextlib.ExitStack], None]] = {
    "state ignored": _spoiling(_ignore_state),
    "tokens alike": _spoiling(_make_tokens_alike),
    "one expert takes all": _pushing(2, _PUSH),
    "dead expert": _pushing(1, -_PUSH),
    "NaN in an expert": _spoiling(_spoil_expert),
    "corrupted batch": _corrupt_batch,
    "none": lambda stack: None,
}


def write_easy_corpus(prefix: Path) -> Path:
    """Write a dataset of four tokens in turn, which a model learns in a dozen steps, and return its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(40):
        builder.add_item(torch.arange(48) % 4)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
