"""Groups of parameters in a checkpoint of the optimizer, and those of a run with another schedule.

Megatron matches them by all that is set for a group, its learning rates among them, and finds none after a change of
`--lr` that `--override-opt-param-scheduler` allows.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.training import get_args

__all__ = ["take_saved_schedule", "with_current_schedule"]

_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")


def with_current_schedule(current: list[dict], saved: list[dict]) -> list[dict]:
    """Return saved groups with the schedule of the current ones, so that Megatron finds them.

    What the saved schedule was is looked at by `OptimizerParamScheduler`, which knows what may change.

    Args:
        current: Groups of the optimizer.
        saved: Groups of the checkpoint.
    """
    schedules = {_kind(group): _schedule(group) for group in current}
    if len(schedules) < len(current):  # Parameters have schedules of their own: only these tell the groups apart.
        return saved
    rest = [{key: value for key, value in group.items() if key not in _SCHEDULE} for group in saved]
    return [{**group, **schedules.get(_kind(group), _schedule(old))} for group, old in zip(rest, saved, strict=True)]


def take_saved_schedule(current: list[dict], saved: list[dict]) -> None:
    """Give the groups of the optimizer the saved schedule where `--use-checkpoint-opt-param-scheduler` asks for it."""
    if get_args().use_checkpoint_opt_param_scheduler:
        schedules = {_kind(group): _schedule(group) for group in saved}
        for group in current:
            group.update(schedules.get(_kind(group), {}))


def _schedule(group: dict) -> dict[str, Any]:
    return {key: group[key] for key in _SCHEDULE if key in group}


def _kind(group: dict) -> tuple:
    # As in Megatron, whose forerunners call some keys otherwise.
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys if key not in _SCHEDULE)
