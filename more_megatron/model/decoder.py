"""A decoder that repeats groups of its layers.

Megatron's `TransformerBlock` runs its layers once. Here each pass through a group is a call of its own `forward` on a
view that has the group's layers, so that FP8 contexts, the random state of sequence parallelism and the arguments of
layers are Megatron's in every pass. Layer numbers, placement on pipeline stages and checkpoint keys stay those of the
plain model.

With full recomputation a pass is recomputed by PyTorch's checkpoint without re-entry, not by Megatron's: a re-entrant
one announces the gradients of the group once a pass, and the overlapped reduction, which counts announcements, would
start too early in a step with more passes than the first.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.typed_torch import apply_module
from megatron.core.utils import make_viewless_tensor
from torch.utils.checkpoint import checkpoint

from more_megatron.errors import MoREError
from more_megatron.model.halting import StateInPass
from more_megatron.model.micro_batch import CARRIER, MicroBatch, Pass
from more_megatron.model.noise import TokenGrid
from more_megatron.model.stack import Stack


def repeat_groups(decoder: TransformerBlock, stack: Stack) -> None:
    """Make a decoder that Megatron built repeat the groups of the stack that lie on its pipeline stage, uncut."""
    decoder.__class__ = RepeatingDecoder
    assert isinstance(decoder, RepeatingDecoder)
    decoder.embedding_scale = stack.embedding_scale
    here, loops, runs = stack.stage(decoder.vp_stage), {}, []
    for number, (group, layers) in enumerate(stack.places()):
        local = range(max(layers.start, here.start) - here.start, min(layers.stop, here.stop) - here.start)
        if len(local) == 0:
            continue
        runs.append(_Run(local, None if group.loop is None else str(number)))
        if group.loop is not None:
            loops[str(number)] = group.loop.module(decoder.config, number, decoder.pg_collection)
    # A child module: what hangs on the decoder itself would be left out of checkpoints.
    decoder.loops = torch.nn.ModuleDict(loops)
    decoder.runs = tuple(runs)
    decoder.coda = None
    if stack.norms_core_output and decoder.final_layernorm is not None:
        # The stage may begin behind the last looped group.
        decoder.coda = max((index + 1 for index, run in enumerate(runs) if run.loop is not None), default=0)


@dataclass(frozen=True)
class _Run:
    """Layers of a stage, by their indices there, and the name of the loop that repeats them; None: they run once."""

    layers: range
    loop: str | None


class _View:
    """Some layers of a decoder, as `TransformerBlock.forward` wants a decoder; everything else is the decoder's."""

    def __init__(self, decoder: TransformerBlock, layers: range, is_checkpointed_outside: bool) -> None:
        self._decoder = decoder
        self.layers = [decoder.layers[index] for index in layers]
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.pre_process, self.final_layernorm = True, None
        self.config = decoder.config
        if is_checkpointed_outside:
            self.config = copy.copy(decoder.config)
            self.config.recompute_granularity = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class RepeatingDecoder(TransformerBlock):
    """Megatron's decoder, which runs some of its layers several times. Made by `repeat_groups`."""

    loops: torch.nn.ModuleDict
    runs: tuple[_Run, ...]
    embedding_scale: float
    coda: int | None
    """Index of the run in front of which the final norm is applied as well; None: nowhere."""

    def forward(self, hidden_states: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layers of this stage; arguments as for Megatron's decoder, with the record of the micro-batch.

        Hidden states are [s, b, h]; on later pipeline stages what `set_input_tensor` was given counts.
        """
        assert not args, "arguments of a repeating decoder are given by name"
        if kwargs.get("extract_layer_indices"):
            raise MoREError("layers that are repeated have no one output: leave out extract_layer_indices")
        if not self.pre_process:
            hidden_states = self.input_tensor
        elif self.embedding_scale != 1.0:
            hidden_states = hidden_states * self.embedding_scale
        micro_batch = MicroBatch.of_layer(kwargs, self.config, self.training)
        for index, run in enumerate(self.runs):
            if index == self.coda:
                hidden_states = self._normed(hidden_states)
            if run.loop is None:
                view: Any = _View(self, run.layers, is_checkpointed_outside=False)
                hidden_states = TransformerBlock.forward(view, hidden_states, attention_mask, **kwargs)
            else:
                grid = TokenGrid.of(hidden_states, micro_batch, self.config, self.tp_group, self._place(run.layers))
                run_once = _passes(self, run.layers, micro_batch, attention_mask, kwargs)
                hidden_states = self.loops[run.loop](hidden_states, run_once, micro_batch.depth, grid)
        if self.coda == len(self.runs):
            hidden_states = self._normed(hidden_states)
        if self.final_layernorm is not None:
            hidden_states = self._normed(hidden_states)
        elif not self.runs:
            # Pipeline schedules free the output of a stage, which must not be its input.
            hidden_states = hidden_states.clone()
        return make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)

    def place_of_loop(self, name: str) -> str:
        """Return which layers a loop of this stage repeats, in words."""
        return self._place(next(run.layers for run in self.runs if run.loop == name))

    def _place(self, layers: range) -> str:
        first, last = (self.layers[index].layer_number for index in (layers[0], layers[-1]))
        return f"layer {first}" if first == last else f"layers {first}-{last}"

    def _normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return apply_module(self.final_layernorm)(hidden_states)


def _passes(
    decoder: RepeatingDecoder,
    layers: range,
    micro_batch: MicroBatch,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> StateInPass:
    """Return what runs a group of layers once, as often as a loop asks for it."""
    kwargs = {name: value for name, value in kwargs.items() if name != CARRIER}
    parts, in_graph = list(_parts(decoder, layers)), torch.is_grad_enabled()
    former: dict[Hashable, torch.Tensor] = {}

    def run(hidden_states: torch.Tensor, index: int) -> torch.Tensor:
        nonlocal former
        left: dict[Hashable, torch.Tensor] = {}
        for part, recomputed in parts:
            current = Pass(micro_batch, index, former, left, in_graph)
            compute = _part(_View(decoder, part, is_checkpointed_outside=True), current, attention_mask, kwargs)
            recomputed = recomputed and torch.is_grad_enabled()
            hidden_states = _recomputed(compute, hidden_states, decoder) if recomputed else compute(hidden_states)
        former = left
        return hidden_states

    return run


def _part(
    view: Any, current: Pass, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return some layers in one pass. Called again it is a recomputation, of which nothing is counted or kept."""
    calls = itertools.count()

    def compute(hidden_states: torch.Tensor) -> torch.Tensor:
        is_replay = next(calls) > 0
        carried = {CARRIER: current.replayed() if is_replay else current}
        with _unrecorded() if is_replay else contextlib.nullcontext():
            return TransformerBlock.forward(view, hidden_states, attention_mask, **carried, **kwargs)

    return compute


def _parts(decoder: RepeatingDecoder, layers: range) -> Iterator[tuple[range, bool]]:
    """Yield the parts in which a pass is computed, and whether each is recomputed in the backward pass."""
    config = decoder.config
    if config.recompute_granularity != "full" or not decoder.training:
        yield layers, False
        return
    count = config.recompute_num_layers
    if config.recompute_method == "block":  # the first layers only
        yield from ((layers[index : index + 1], index < count) for index in range(len(layers)))
    else:
        yield from ((layers[index : index + count], True) for index in range(0, len(layers), count))


def _recomputed(
    run: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, decoder: RepeatingDecoder
) -> torch.Tensor:
    """Apply `run`, keeping its input only, and recompute it with the same random numbers."""
    if decoder.config.fp8 or decoder.config.fp4:
        tracker = tensor_parallel_random.get_cuda_rng_tracker
        return te_checkpoint(run, False, tracker, decoder.pg_collection.tp, hidden_states, use_reentrant=False)
    states = tensor_parallel_random._get_all_rng_states()

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _random_states(states)

    return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def _random_states(states: tuple[Any, ...]) -> Iterator[None]:
    """Inside the block, all of Megatron's random states are those that are given."""
    with tensor_parallel_random._fork_rng():
        tensor_parallel_random._set_all_rng_states(*states)
        yield


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    """Inside the block, nothing that MoE layers report is kept."""
    tracker = get_moe_metrics_tracker()
    set_moe_metrics_tracker(MoEMetricsTracker())
    try:
        yield
    finally:
        set_moe_metrics_tracker(tracker)
