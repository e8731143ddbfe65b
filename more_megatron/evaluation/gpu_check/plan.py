"""How large each stage is: on a GPU, and in miniature on a CPU."""

import math
from dataclasses import dataclass
from pathlib import Path

from more_megatron.evaluation.command_lines import Flags, as_typed, parse_flags, read_by
from more_megatron.systems import get_system

BACKENDS = {
    "local": parse_flags("--transformer-impl local"),
    "te": parse_flags("--transformer-impl transformer_engine --moe-grouped-gemm"),
}
PRECISIONS = {"fp32": parse_flags("--no-bf16"), "bf16": parse_flags("--bf16")}
# What a CPU computes, and a GPU without rounding.
EXACT = BACKENDS["local"] | PRECISIONS["fp32"]
_RECIPES = {
    name: parse_flags(f"--fp8-format hybrid --fp8-recipe {name}") for name in ("tensorwise", "blockwise", "delayed")
}


@dataclass(frozen=True)
class Sizes:
    """Flags of the models of each stage, and how long it trains or measures."""

    parity: Flags  # stage b
    training: Flags  # stages c and f
    fp8: Flags  # stage d
    speed: Flags  # stage e, without the micro-batch
    training_steps: int = 30  # of stage c
    fall: float = 0.5  # nats that the loss must fall in them
    fp8_steps: int = 15
    steps: int = 4  # recurrence steps at which stage e compares systems
    rounds: int = 5  # steps that it measures, after some that warm up
    warmup: int = 2
    depths: tuple[int, ...] = (1, 2, 8)  # recurrence steps at which it times a step, too
    micro_batch: int = 8  # the largest
    matmul: int = 8192  # rows and columns of the matrices that the peak is measured with
    copy_bytes: int = 1 << 32  # size of the copy that the bandwidth is measured with


# Every stage begins from these.
_COMMON = parse_flags("""
    --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0
""")
_TRAINING = parse_flags("""
    --num-layers 3 --hidden-size 128 --num-attention-heads 4 --seq-length 64
    --ffn-hidden-size 256 --moe-ffn-hidden-size 128
    --micro-batch-size 16 --global-batch-size 16 --split 1,0,0 --lr 2e-3 --lr-decay-style constant
""")
# There is no optimizer, whose buffers a fused accumulation would add to.
_PARITY = parse_flags("""
    --num-layers 3 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --ffn-hidden-size 128 --moe-ffn-hidden-size 64
    --micro-batch-size 2 --no-gradient-accumulation-fusion --lr 1e-3
""")
_SPEED = parse_flags("""
    --num-layers 3 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048
    --ffn-hidden-size 5632 --moe-ffn-hidden-size 2816 --recurrence-ffn-hidden-size 4096
    --num-experts 8 --vocab-size 32767 --micro-batch-size 1 --no-gradient-accumulation-fusion --lr 1e-4
""")
# Blockwise scaling wants multiples of 128. In the second micro-batch of a step weights are not quantized again.
_FP8 = _TRAINING | parse_flags(
    "--hidden-size 256 --seq-length 128 --ffn-hidden-size 512 --moe-ffn-hidden-size 256 --micro-batch-size 8"
)
GPU = Sizes(_PARITY, _TRAINING, _FP8, _SPEED)

_SMALL = parse_flags("--hidden-size 32 --seq-length 16 --ffn-hidden-size 64 --moe-ffn-hidden-size 32")
_SMALL_TRAINING = _TRAINING | _SMALL | parse_flags("--micro-batch-size 4 --global-batch-size 8 --lr 1e-2")
DRY = Sizes(
    _PARITY | _SMALL,
    _SMALL_TRAINING,
    _SMALL_TRAINING,
    _SPEED
    | _SMALL
    | parse_flags("--recurrence-ffn-hidden-size 64 --num-attention-heads 4 --num-experts 4 --vocab-size 127"),
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

_TP2, _EP2 = (parse_flags(f"--{kind}-model-parallel-size 2") for kind in ("tensor", "expert"))
_PARALLEL: dict[str, Flags] = {
    "dp": {},
    "tp2": _TP2,
    "ep2": _EP2,
    "tp2 ep2": _TP2 | _EP2 | {"expert-tensor-parallel-size": 1},
    "ep2 allgather": _EP2 | {"moe-token-dispatcher-type": "allgather"},
}


def _ranks_of(flags: Flags) -> int:
    return math.prod(int(size) for name, size in flags.items() if name.endswith("model-parallel-size"))


@dataclass(frozen=True)
class Plan:
    """What a check is made of."""

    dry: bool  # whether a CPU in miniature takes the place of the GPU
    sizes: Sizes
    systems: tuple[str, ...]
    folder: Path  # for what the cases hand each other
    ranks: int = 1  # that stage f takes: all GPUs, two processes in miniature
    has_te: bool = False  # whether Transformer Engine is there

    @property
    def platform(self) -> str:
        """Where what is checked runs."""
        return "cpu" if self.dry else "cuda"

    @property
    def baseline_first(self) -> list[str]:
        """The systems, that without recurrence first which others are compared with."""
        return sorted(self.systems, key=lambda name: get_system(name).recurrent)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those in which a model is compared with the CPU's."""
        return ("fp32",) if self.dry else tuple(PRECISIONS)

    @property
    def backends(self) -> dict[str, Flags]:
        """Flags of the backends there are; on a CPU the same path is taken twice."""
        if self.dry:
            return {"local": BACKENDS["local"], "again": BACKENDS["local"]}
        return {name: flags for name, flags in BACKENDS.items() if name != "te" or self.has_te}

    @property
    def best_backend(self) -> Flags:
        """Flags of Transformer Engine's backend where it is there."""
        return list(self.backends.values())[-1]

    @property
    def recipes(self) -> dict[str, Flags]:
        """Flags of each FP8 recipe; a CPU has no FP8, and takes the same path without it."""
        return {next(iter(_RECIPES)): {}} if self.dry else _RECIPES

    @property
    def layouts(self) -> dict[str, Flags]:
        """Layouts for all ranks, by name."""
        if self.dry:
            return {name: _PARALLEL[name] for name in ("dp", "tp2")}
        return {name: flags for name, flags in _PARALLEL.items() if self.ranks % _ranks_of(flags) == 0}

    @property
    def shared_batch(self) -> Flags:
        """Flags of a batch with a micro-batch for each rank: one rank takes the same ones in turn."""
        return {"micro-batch-size": 2, "global-batch-size": 2 * self.ranks}

    @property
    def corpus(self) -> Path:
        """Prefix of the dataset."""
        return self.folder / "counting"


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

    Later flags stand over earlier ones, and all over what every stage begins from. Steps are for systems that have
    them; all are with gradient unless `backprop_steps` says otherwise.
    """
    merged: Flags = {"more-variant": system} | _COMMON
    merged |= {"recurrence-steps": steps, "recurrence-backprop-steps": backprop_steps or steps}
    for more in flags:
        merged |= more
    return as_typed(read_by(system, merged))
