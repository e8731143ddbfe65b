"""Repairs for defects of the `megatron-core` wheel, active on every platform.

Each is a stand-in like those of the CPU platform: it names the text of the wheel that it mends.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.training import get_args, training

from more_megatron.console import start_is_over
from more_megatron.platform.checkpoint_writer import async_loop, results_queue
from more_megatron.platform.checkpointing import CHECKPOINTING
from more_megatron.platform.failed_writes import CALLERS, WRITERS
from more_megatron.platform.finite import FINITE
from more_megatron.platform.param_groups import take_saved_schedule, with_current_schedule
from more_megatron.platform.reports import REPORTS
from more_megatron.platform.stand_in import StandIn

__all__ = ["WHEEL_REPAIRS"]

_COMPILE_HELPERS = dataset_utils.compile_helpers


def _compile_helpers_if_missing() -> None:
    """Compile the dataset index builder unless its compiled form is there."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        _COMPILE_HELPERS()


_STATE_DICT = DistributedOptimizer.state_dict
_LOAD_STATE_DICT = DistributedOptimizer.load_state_dict
_SET_STATES = DistributedOptimizer._set_main_param_and_optimizer_states
_FILTER_PARAM_GROUPS = MegatronOptimizer._filter_and_reorder_param_groups


def _state_dict_with_steps(self: DistributedOptimizer) -> dict[str, Any]:
    """Return the state dict, giving an optimizer without any state a step count.

    One that has not stepped yet gets the state it is about to load into. One without parameters, as that of experts
    on a pipeline stage without any, never steps: its count is the number of training steps.
    """
    if HAVE_APEX_OR_TE or len(self.optimizer.state) > 0:
        return _STATE_DICT(self)
    if any(group["params"] for group in self.optimizer.param_groups):
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
        return _STATE_DICT(self)
    taken = getattr(get_args(), "curr_iteration", -1) + 1
    self.optimizer.state["of no parameter"] = {"step": torch.tensor(float(taken))}
    try:
        return _STATE_DICT(self)
    finally:
        del self.optimizer.state["of no parameter"]


def _load_state_dict_with_own_steps(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load under any schedule, then give each parameter a step of its own, not one tensor that all count up."""
    saved = state_dict["optimizer"]["param_groups"]
    groups = with_current_schedule(self.optimizer.param_groups, saved)
    _LOAD_STATE_DICT(self, {**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}})
    take_saved_schedule(self.optimizer.param_groups, saved)
    if not HAVE_APEX_OR_TE:
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def _set_states_but_step(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    """Set the state of a parameter; its step comes with the parameter groups, not with the tensors."""
    _SET_STATES(self, model_param, {"step": None, **tensors})


def _filter_param_groups(current_groups: list[dict], saved_groups: list[dict]) -> list[dict]:
    """Match groups under any schedule, and number the parameters of this rank, not of the rank that saved."""
    groups = _FILTER_PARAM_GROUPS(current_groups, with_current_schedule(current_groups, saved_groups))
    take_saved_schedule(groups, saved_groups)
    first = 0
    for group, current in zip(groups, current_groups, strict=True):
        group["params"] = list(range(first, first + len(current["params"])))
        first += len(current["params"])
    return groups


_TRAINING_LOG = training.training_log


def _training_log(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
    """Log as Megatron does, and begin a new average after a first line that would have come anyway."""
    start_is_over()
    iteration = args[3]
    comes_anyway = iteration % get_args().log_interval == 0
    return _TRAINING_LOG(*args, is_first_iteration=is_first_iteration and not comes_anyway, **kwargs)


WHEEL_REPAIRS = (
    StandIn(
        "megatron.core.datasets.utils",
        "compile_helpers",
        _compile_helpers_if_missing,
        "it runs make in a folder that has no Makefile, although the compiled helper is shipped",
        "core/datasets/utils.py",
        'command = ["make", "-C"',
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        "state_dict",
        _state_dict_with_steps,
        "without Transformer Engine and apex it asserts a step count before any step, so no checkpoint can be loaded",
        "core/optimizer/distrib_optimizer.py",
        'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()]))',
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        "load_state_dict",
        _load_state_dict_with_own_steps,
        "without Transformer Engine and apex all parameters share one step tensor, and each counts it up",
        "core/optimizer/distrib_optimizer.py",
        's["step"] = step',
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        "_set_main_param_and_optimizer_states",
        _set_states_but_step,
        "without Transformer Engine and apex it looks for a step among tensors that are loaded without one",
        "core/optimizer/distrib_optimizer.py",
        "if not isinstance(tensors[key], torch.Tensor):",
    ),
    StandIn(
        "megatron.core.optimizer.optimizer:MegatronOptimizer",
        "_filter_and_reorder_param_groups",
        staticmethod(_filter_param_groups),
        "parameters keep the numbers of the rank that saved, and groups are matched by their learning rates",
        "core/optimizer/optimizer.py",
        "group['params'] = params",
    ),
    StandIn(
        "megatron.training.training",
        "training_log",
        _training_log,
        "losses of the first line are averaged into the second: a resumed run prints others than an uninterrupted one",
        "training/training.py",
        "should_reset = not is_first_iteration",
    ),
    StandIn(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        results_queue,
        "its process ends at the SIGTERM that a run outlives to save once more, and imports PyTorch and Megatron",
        "core/dist_checkpointing/strategies/filesystem_async.py",
        "_results_queue = ctx.Manager().Queue()",
    ),
    StandIn(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller",
        "async_loop",
        staticmethod(async_loop),
        "as above, and without a GPU it picks one among none",
        "core/dist_checkpointing/strategies/async_utils.py",
        "torch.cuda.set_device(rank % torch.cuda.device_count())",
    ),
    *REPORTS,
    *CHECKPOINTING,
    *FINITE,
    *WRITERS,
    *CALLERS,
)
