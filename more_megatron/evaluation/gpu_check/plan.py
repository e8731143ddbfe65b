"""How large each stage is: on a GPU, and in miniature on a CPU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_megatron.flags import MoREFlags
from more_megatron.systems import get_system

__all__ = ["BACKENDS", "DRY", "GPU", "Backend", "Flags", "Plan", "Sizes", "command_line", "everywhere"]

# Flags of Megatron's or ours by name without the dashes; None: a switch.
Flags = dict[str, Any]


@dataclass(frozen=True)
class Backend:
    """A backend as the check names it.

    Attributes:
        name: In reports.
        flags: That choose it.
    """

    name: str
    flags: Flags


BACKENDS = {
    "local": Backend("local", {"transformer-impl": "local"}),
    "te": Backend("te", {"transformer-impl": "transformer_engine", "moe-grouped-gemm": None}),
}
# What takes the place of both where there is a CPU only: the same path is taken twice.
_ON_A_CPU = (BACKENDS["local"], Backend("again", BACKENDS["local"].flags))
_RECIPES: dict[str, Flags] = {
    name: {"fp8-format": "hybrid", "fp8-recipe": name} for name in ("tensorwise", "blockwise", "delayed")
}


@dataclass(frozen=True)
class Sizes:
    """Flags of the models of each stage, and how long it trains or measures.

    Attributes:
        parity: Model of stage b.
        training: Model of stages c and f.
        fp8: Model of stage d.
        speed: Model of stage e, without the micro-batch.
        training_steps: Training steps of stage c.
        fall: By how many nats the loss must fall in them.
        fp8_steps: Training steps of stage d.
        steps: Recurrence steps at which stage e compares systems.
        rounds: Measured steps of stage e.
        warmup: Steps before them.
        depths: Recurrence steps at which a step is timed.
        micro_batch: Largest micro-batch of stage e.
        matmul: Size of the matrices that the peak is measured with.
        copy_bytes: Size of the copy that the bandwidth is measured with.
    """

    parity: Flags
    training: Flags
    fp8: Flags
    speed: Flags
    training_steps: int = 30
    fall: float = 0.5
    fp8_steps: int = 15
    steps: int = 4
    rounds: int = 5
    warmup: int = 2
    depths: tuple[int, ...] = (1, 2, 8)
    micro_batch: int = 8
    matmul: int = 8192
    copy_bytes: int = 1 << 32


# Every stage begins from these.
_COMMON: Flags = {
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-aux-loss-coeff": 0.01,
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 127,
    "make-vocab-size-divisible-by": 8,
    "eval-iters": 0,
    "eval-interval": 1000,
    "log-interval": 1,
    "num-workers": 0,
}
_TRAINING: Flags = {
    "num-layers": 3,
    "hidden-size": 128,
    "num-attention-heads": 4,
    "seq-length": 64,
    "ffn-hidden-size": 256,
    "moe-ffn-hidden-size": 128,
    "micro-batch-size": 16,
    "global-batch-size": 16,
    "split": "1,0,0",
    "lr": 2e-3,
    "lr-decay-style": "constant",
}
_PARITY: Flags = {
    "num-layers": 3,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "ffn-hidden-size": 128,
    "moe-ffn-hidden-size": 64,
    "micro-batch-size": 2,
    # There is no optimizer, whose buffers a fused accumulation would add to.
    "no-gradient-accumulation-fusion": None,
    "lr": 1e-3,
}
_SPEED: Flags = {
    "num-layers": 3,
    "hidden-size": 2048,
    "num-attention-heads": 16,
    "seq-length": 2048,
    "ffn-hidden-size": 5632,
    "moe-ffn-hidden-size": 2816,
    "recurrence-ffn-hidden-size": 4096,
    "num-experts": 8,
    "vocab-size": 32767,
    "micro-batch-size": 1,
    "no-gradient-accumulation-fusion": None,
    "lr": 1e-4,
}

GPU = Sizes(
    parity=_PARITY,
    training=_TRAINING,
    # Blockwise scaling wants multiples of 128.
    fp8=_TRAINING
    | {"hidden-size": 256, "seq-length": 128, "ffn-hidden-size": 512, "moe-ffn-hidden-size": 256}
    # In the second micro-batch of a step weights are not quantized again.
    | {"micro-batch-size": 8},
    speed=_SPEED,
)
_SMALL: Flags = {"hidden-size": 32, "seq-length": 16, "ffn-hidden-size": 64, "moe-ffn-hidden-size": 32}
DRY = Sizes(
    parity=_PARITY | _SMALL,
    training=_TRAINING | _SMALL | {"micro-batch-size": 4, "global-batch-size": 8, "lr": 1e-2},
    fp8=_TRAINING | _SMALL | {"micro-batch-size": 4, "global-batch-size": 8, "lr": 1e-2},
    speed=_SPEED
    | _SMALL
    | {"recurrence-ffn-hidden-size": 64, "num-attention-heads": 4, "num-experts": 4, "vocab-size": 127},
    training_steps=6,
    fall=0.05,
    fp8_steps=3,
    steps=2,
    rounds=2,
    warmup=1,
    depths=(1, 2),
    micro_batch=2,
    matmul=256,
    copy_bytes=1 << 22,
)


_TP2, _PP3, _EP2 = (
    {f"{kind}-model-parallel-size": size} for kind, size in (("tensor", 2), ("pipeline", 3), ("expert", 2))
)
_PARALLEL: dict[str, Flags] = {
    "dp": {},
    "tp2": _TP2,
    "ep2": _EP2,
    "tp2 ep2": _TP2 | _EP2 | {"expert-tensor-parallel-size": 1},
    "ep2 allgather": _EP2 | {"moe-token-dispatcher-type": "allgather"},
}


def _ranks_of(flags: Flags) -> int:
    return math.prod(size for name, size in flags.items() if name.endswith("model-parallel-size"))


@dataclass(frozen=True)
class Plan:
    """What a check is made of.

    Attributes:
        dry: Whether a CPU in miniature takes the place of the GPU.
        systems: Names of the systems.
        folder: For what the cases hand each other.
        ranks: Number of ranks that stage f takes: all GPUs, two processes in miniature.
        has_te: Whether Transformer Engine is there.
    """

    dry: bool
    systems: tuple[str, ...]
    folder: Path
    ranks: int
    has_te: bool

    @property
    def sizes(self) -> Sizes:
        """How large everything is."""
        return DRY if self.dry else GPU

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The backends there are."""
        if self.dry:
            return _ON_A_CPU
        return tuple(BACKENDS.values()) if self.has_te else (BACKENDS["local"],)

    @property
    def layouts(self) -> dict[str, Flags]:
        """Layouts for all ranks, by name."""
        if self.dry:
            return {"tp2": _PARALLEL["tp2"]}
        return {name: flags for name, flags in _PARALLEL.items() if self.ranks % _ranks_of(flags) == 0}

    @property
    def platform(self) -> str:
        """Where what is checked runs."""
        return "cpu" if self.dry else "cuda"

    @property
    def recipes(self) -> dict[str, Flags]:
        """Flags of each FP8 recipe; a CPU has no FP8, and takes the same path without it."""
        return {next(iter(_RECIPES)): {}} if self.dry else _RECIPES


def everywhere(system: str) -> Flags:
    """Return flags under which every token goes to all experts, of feed-forward parts and of whatever else has them."""
    number = _COMMON["num-experts"]
    flags: Flags = {"moe-router-topk": number}
    for name in get_system(system).own_flags():
        if name.endswith("_topk"):
            kind = name.removesuffix("_topk").replace("_", "-")
            flags |= {f"{kind}-num-experts": number, f"{kind}-topk": number}
    return flags


def command_line(system: str, *flags: Flags, steps: int = 2, backprop_steps: int | None = None) -> str:
    """Return the flags of a run of `pretrain_more.py`.

    Args:
        system: Name of the system.
        flags: Later ones stand over earlier ones, and all over what every stage begins from.
        steps: Recurrence steps, of a system that has them.
        backprop_steps: Those with gradient. Default: all.
    """
    depth = {"recurrence-steps": steps, "recurrence-backprop-steps": backprop_steps or steps}
    merged: Flags = {"more-variant": system} | _COMMON | depth
    for more in flags:
        merged |= more
    # A system refuses flags that it never reads.
    ours = {field.name for field in dataclasses.fields(MoREFlags)} - {"more_variant", *get_system(system).reads}
    merged = {name: value for name, value in merged.items() if name.replace("-", "_") not in ours}
    return " ".join(f"--{name}" if value is None else f"--{name} {value}" for name, value in merged.items())
