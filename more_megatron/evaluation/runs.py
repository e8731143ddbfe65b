"""Models and training runs, one after the other in one process, each from a command line of `pretrain_more.py`."""

import contextlib
import functools
import gc
import io
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.training import checkpointing, global_vars, pretrain, training
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.evaluation.training_log import Iteration, read_log
from more_megatron.model.builder import MoREModelConfig
from more_megatron.monitoring.figures import report_to
from more_megatron.platform import Platform, initialize_platform
from more_megatron.platform.repairs.finite import Tracer, trace_reruns
from more_megatron.training.arguments import parse_arguments
from more_megatron.training.model import model_config_from_args, pretrain_arguments


def configure(command_line: str) -> tuple[Namespace, GPTModelConfig]:
    """Return arguments and model configuration of a run that is not started, of flags separated by blanks."""
    global_vars.destroy_global_vars()
    unset_num_microbatches_calculator()
    _free()
    with contextlib.redirect_stdout(io.StringIO()), started_with(f"--train-iters 1 {command_line}") as described:
        return described


def fresh_model(model_config: GPTModelConfig, seed: int = 1234) -> GPTModel:
    """Return a model as initialized, on the device and in the dtype of its parameters, in training mode.

    Forms Megatron's process groups of the one rank there is where there are none: it meets nobody, and needs neither a
    port nor the variables of a launcher.
    """
    if not torch.distributed.is_initialized():
        backend = "nccl" if initialize_platform() is Platform.CUDA else "gloo"
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_config.get_builder_cls()(model_config).build_model(groups)
    return model.cuda(torch.cuda.current_device()).to(model_config.transformer.params_dtype).train()


def train(command_line: str) -> list[Iteration]:
    """Train as `pretrain_more.py` does and return what each step reported, on the last rank.

    Raises:
        RuntimeError: If Megatron ends the run before its time.
    """
    read_each_docstring_once()
    forget_run()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), started_with(command_line) as (args, model_config):
        try:
            pretrain(*pretrain_arguments(args, model_config))
        except SystemExit as leaving:
            if leaving.code:  # None: --exit-interval among others
                raise RuntimeError(f"Megatron ended the run with exit code {leaving.code}") from leaving
        finally:
            forget_run()
            print(output.getvalue(), file=sys.__stdout__)
    return read_log(output.getvalue().splitlines()).iterations


@contextlib.contextmanager
def started_with(command_line: str) -> Iterator[tuple[Namespace, MoREModelConfig]]:
    """Inside the block, be `pretrain_more.py` with these flags, and yield arguments and model configuration."""
    former = sys.argv
    sys.argv = ["pretrain_more.py", *shlex.split(command_line)]
    try:
        args = parse_arguments(initialize_platform())
        yield args, model_config_from_args(args)
    finally:
        sys.argv = former


def forget_run() -> None:
    """Put Megatron's process-wide state back to where it is in a process that has not trained yet.

    The process group of all ranks stays; Megatron takes it over where it finds one.
    """
    _empty_models()
    if torch.distributed.is_initialized():
        # Megatron forgets its groups, and would leave their communicators in memory.
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                torch.distributed.destroy_process_group(group)
    training.destroy_global_state()
    destroy_moe_metrics_tracker()
    report_to(None)
    trace_reruns(Tracer())
    checkpointing._CHECKPOINT_VERSION = None
    checkpointing._LOADED_ITERATION = None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _free()


def _empty_models() -> None:
    """Take their content from the models of former runs, which nothing else can free.

    A model's last graph, which its token dispatchers keep, and its wrapper's hooks hold each other through nodes of
    C++, where Python's collector does not look. With the model its process groups and their threads would stay.
    """
    for model in [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]:
        vars(model).clear()


def _free() -> None:
    """Give back what the model before took, and forget the scale of its losses."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    gc.collect()
    torch.cuda.empty_cache()


@functools.cache
def read_each_docstring_once() -> None:
    """Keep the flags' help, which is read from the source of 27 classes: a third of a second for each command line."""
    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, object.__new__(ArgumentGroupFactory))
    cached = functools.cache(read)
    ArgumentGroupFactory._get_field_docstrings = lambda self, src_cfg_class: cached(src_cfg_class)
