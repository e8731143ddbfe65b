"""Training runs inside a rank: the command line in, losses and gradient norms out."""

import re
from dataclasses import dataclass, field
from typing import Any

from megatron.training import pretrain, training

from more_megatron.evaluation.runs import started_with
from more_megatron.platform.training_loop import SURROUNDED
from more_megatron.systems import get_system
from more_megatron.training.model import pretrain_arguments
from more_megatron.training.reporting import extend_loop
from tests.helpers.corpus import shared_corpus

# A model that trains in milliseconds a step, large enough for every layout: 4 layers, 4 heads, 4 experts. The caller
# names the data with --data-path.
TINY_ON_FILES = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --ffn-hidden-size 64 "
    "--moe-ffn-hidden-size 32 --num-experts 4 --micro-batch-size 2 --global-batch-size 4 "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8 "
    "--train-iters 6 --lr 1e-3 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0 --log-interval 1 "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --eval-iters 0 --eval-interval 1000"
)

# The same on random tokens.
TINY = f"{TINY_ON_FILES} --data-path {shared_corpus()} --split 90,10,0"


def dense(command_line: str) -> str:
    """Return a command line without the flags of experts."""
    return re.sub(r"--(num-experts|moe-\S+) \S+ ?", "", command_line)


@dataclass
class History:
    """What a run reported."""

    # Loss of each training step in nats; empty on ranks before the last pipeline stage
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # norm of the whole gradient before clipping, of each step
    steps: list[float] = field(default_factory=list)  # recurrence steps of each training step
    # The system's own figures, of each training step
    figures: list[dict[str, float]] = field(default_factory=list)


def train(command_line: str) -> History:
    """Train as `pretrain_more.py` does with these flags, and return what each step reported on this rank."""
    history = History()
    original = training.training_log
    replaced = {name: getattr(training, name) for name in SURROUNDED}

    def record(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The arguments of `training_log` up to the gradient norm, which Megatron passes by position.
        history.grad_norms.append(float(args[6]))
        if "lm loss" in loss_dict:
            history.losses.append(float(loss_dict["lm loss"]))
        if "recurrence steps" in loss_dict:
            history.steps.append(float(loss_dict["recurrence steps"]))
        # Sums over the steps since the last line; the step under way is counted later.
        sums, steps = args[0], args[0].get("advanced iterations", 0) + 1
        history.figures.append({name: float(sums[name]) / steps for name in names if name in sums})
        return original(loss_dict, *args, **kwargs)

    with started_with(command_line) as (args, model_config):
        names = get_system(args.more_variant).figures(model_config.transformer)
        training.training_log = record
        extend_loop(model_config.transformer, args)
        try:
            pretrain(*pretrain_arguments(args, model_config))
        except SystemExit as leaving:  # --exit-interval
            if leaving.code:
                raise
        finally:
            for name, function in replaced.items():
                setattr(training, name, function)
    return history
