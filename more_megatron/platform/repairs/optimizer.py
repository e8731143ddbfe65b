"""The optimizer's state in checkpoints: without Transformer Engine, without parameters, under another schedule.

Megatron matches groups of parameters by all that is set for them, their learning rates among it, and finds none after a
change of `--lr` that `--override-opt-param-scheduler` allows.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.training import get_args

from more_megatron.platform.stand_in import Table

OPTIMIZER = Table()
_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")


@OPTIMIZER.surrounds(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
    why="without Transformer Engine and apex it asserts a step count before any step, so no checkpoint can be loaded",
    text='steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()]))',
)
def _state_dict_with_steps(former: Any, self: DistributedOptimizer) -> dict[str, Any]:
    """Return the state dict, giving an optimizer without any state a step count.

    One that has not stepped yet gets the state it is about to load into. One without parameters, as that of experts
    on a pipeline stage without any, never steps: its count is the number of training steps.
    """
    if HAVE_APEX_OR_TE or len(self.optimizer.state) > 0:
        return former(self)
    if any(group["params"] for group in self.optimizer.param_groups):
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
        return former(self)
    taken = getattr(get_args(), "curr_iteration", -1) + 1
    self.optimizer.state["of no parameter"] = {"step": torch.tensor(float(taken))}
    try:
        return former(self)
    finally:
        del self.optimizer.state["of no parameter"]


@OPTIMIZER.surrounds(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
    why="without Transformer Engine and apex all parameters share one step tensor, and each counts it up",
    text='s["step"] = step',
)
def _load_state_dict_with_own_steps(former: Any, self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load under any schedule, then give each parameter a step of its own, not one tensor that all count up."""
    saved = state_dict["optimizer"]["param_groups"]
    groups = _with_current_schedule(self.optimizer.param_groups, saved)
    former(self, {**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}})
    _take_saved_schedule(self.optimizer.param_groups, saved)
    if not HAVE_APEX_OR_TE:
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


@OPTIMIZER.surrounds(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
    why="without Transformer Engine and apex it looks for a step among tensors that are loaded without one",
    text="if not isinstance(tensors[key], torch.Tensor):",
)
def _set_states_but_step(
    former: Any, self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]
) -> None:
    """Set the state of a parameter; its step comes with the parameter groups, not with the tensors."""
    former(self, model_param, {"step": None, **tensors})


@OPTIMIZER.surrounds(
    "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
    why="parameters keep the numbers of the rank that saved, and groups are matched by their learning rates",
    text="group['params'] = params",
)
def _filter_param_groups(former: Any, current_groups: list[dict], saved_groups: list[dict]) -> list[dict]:
    """Match groups under any schedule, and number the parameters of this rank, not of the rank that saved."""
    groups = former(current_groups, _with_current_schedule(current_groups, saved_groups))
    _take_saved_schedule(groups, saved_groups)
    first = 0
    for group, current in zip(groups, current_groups, strict=True):
        group["params"] = list(range(first, first + len(current["params"])))
        first += len(current["params"])
    return groups


def _with_current_schedule(current: list[dict], saved: list[dict]) -> list[dict]:
    """Return saved groups with the schedule of the current ones, so that Megatron finds them.

    What the saved schedule was is looked at by `OptimizerParamScheduler`, which knows what may change.
    """
    schedules = {_kind(group): _schedule(group) for group in current}
    if len(schedules) < len(current):  # More schedules than --lr and --decoupled-lr: only they tell the groups apart.
        return saved
    rest = [{key: value for key, value in group.items() if key not in _SCHEDULE} for group in saved]
    return [{**group, **schedules.get(_kind(group), _schedule(old))} for group, old in zip(rest, saved, strict=True)]


def _take_saved_schedule(current: list[dict], saved: list[dict]) -> None:
    """Give the groups of the optimizer the saved schedule where `--use-checkpoint-opt-param-scheduler` asks for it."""
    if get_args().use_checkpoint_opt_param_scheduler:
        schedules = {_kind(group): _schedule(group) for group in saved}
        for group in current:
            group.update(schedules.get(_kind(group), {}))


def _schedule(group: dict) -> dict[str, Any]:
    return {key: group[key] for key in _SCHEDULE if key in group}


def _kind(group: dict) -> tuple:
    # As in Megatron, whose forerunners call some keys otherwise; and what --decoupled-lr is for is no default.
    keys = (key for key in param_group_identifier_keys if key not in _SCHEDULE)
    return (group.get("default_config", True), *(group.get(key, group.get(f"pre_{key}")) for key in keys))
