"""What every layer must know about the micro-batch it works on, as a tensor that travels with it.

With pipeline parallelism several micro-batches are in flight, and recomputation visits a micro-batch again long after
another one's forward pass. So nothing of this may be kept on a module: it is an argument of the layer. Megatron's
`TransformerBlock` hands each layer the cross-attention mask, through pipeline stages and recomputation alike, and a
decoder-only model has no other use for it; `MicroBatch.block_kwargs` puts the record there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth

# Argument of Megatron's layers that the record travels as.
CARRIER = "context_mask"


@dataclass(frozen=True)
class MicroBatch:
    """The depth of a micro-batch and who its sequences are."""

    depth: Depth  # recurrence steps to take
    # Position of each of the b sequences in the stream of training samples, or one for all; 0 in evaluation
    sample_ids: tuple[int, ...] = (0,)
    # Where the problems of each row begin, in ascending order and filled up with the length of a row, int64
    # [b, problems] in host memory; the first is 0. None: a row is one sequence
    starts: torch.Tensor | None = dataclasses.field(default=None, compare=False)

    @property
    def parts(self) -> int:
        """Sequences that a row can have."""
        return 1 if self.starts is None else self.starts.size(1)

    def block_kwargs(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments for the model's `extra_block_kwargs`.

        The tensor has steps, sample id and starts of each row, int64 [b, 3 + problems], or [1, 3] if nothing tells the
        rows apart. It stays in host memory: layers read it without waiting for a GPU.
        """
        steps = self.depth.no_grad_steps, self.depth.grad_steps
        rows = torch.tensor([(*steps, sample) for sample in self.sample_ids or (0,)], dtype=torch.int64, device="cpu")
        if self.starts is not None:
            rows = torch.cat((rows.expand(len(self.starts), 3), self.starts), dim=1)
        return {CARRIER: rows}

    @classmethod
    def of_layer(cls, kwargs: dict[str, Any], config: MoREConfig, training: bool) -> MicroBatch:
        """Return the record that arrived with a layer's keyword arguments.

        Raises:
            MoREError: If no record came along in training, where depth is not the layer's to choose.
        """
        carrier = kwargs.get(CARRIER)
        if isinstance(carrier, Pass):
            return carrier.micro_batch
        if carrier is None:
            if training:
                raise MoREError(
                    "a recurrent layer was called in training without a depth: call the model with "
                    "extra_block_kwargs=MicroBatch(depth, sample_ids).block_kwargs()"
                )
            return cls(Depth(no_grad_steps=config.evaluation_steps, grad_steps=0))
        no_grad_steps, grad_steps = carrier[0, :2].tolist()
        starts = carrier[:, 3:] if carrier.size(1) > 3 else None
        return cls(Depth(no_grad_steps, grad_steps), tuple(carrier[:, 2].tolist()), starts)


@dataclass(frozen=True)
class Pass:
    """One pass through a group of layers that is repeated, as a decoder hands it to them in the place of the record."""

    micro_batch: MicroBatch
    index: int  # number of the pass, from 0
    # What parts of layers left in the pass before, by who they are: numbers of layers, or more
    former: dict[Hashable, torch.Tensor]
    left: dict[Hashable, torch.Tensor]  # where they leave it in this one
    in_graph: bool  # whether the decoder itself was called with gradient
    is_replay: bool = False  # whether the pass was computed before and is recomputed

    @property
    def has_grad(self) -> bool:
        """Whether the pass is one of those with gradient."""
        return self.index >= self.micro_batch.depth.no_grad_steps

    @property
    def loss_weight(self) -> float:
        """Factor on losses that are averaged over the passes with gradient."""
        return 1.0 / max(self.micro_batch.depth.grad_steps, 1)

    @property
    def is_last(self) -> bool:
        """Whether no pass follows."""
        return self.index + 1 == self.micro_batch.depth.steps

    def is_counted(self) -> bool:
        """Return whether what is computed now enters statistics: each pass once, however often it is recomputed."""
        return not self.is_replay and (torch.is_grad_enabled() if self.has_grad else self.in_graph)

    def replayed(self) -> Pass:
        """Return the same pass, recomputed: what is left is not kept."""
        return dataclasses.replace(self, left={}, is_replay=True)

    def leave(self, key: Hashable, value: torch.Tensor) -> None:
        """Leave something for the next pass; out of a pass without gradient it is a constant."""
        self.left[key] = value if self.has_grad else value.detach()
