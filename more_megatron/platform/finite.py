"""Numbers that are not finite end a run: nothing of them is stepped with, saved or loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine
from megatron.training import get_args

from more_megatron.checkpoint_files import newest_clean_iteration
from more_megatron.errors import MoREError
from more_megatron.platform.stand_in import StandIn

__all__ = ["FINITE", "check_parameters"]


def check_parameters(model: Sequence[torch.nn.Module], where: str) -> None:
    """Check that the parameters of all ranks are finite. Called on every rank.

    Args:
        model: Chunks of the model on this rank.
        where: What they are parameters of.

    Raises:
        MoREError: If one is not; the message names the newest checkpoint in which all are.
    """
    parameters = [(name, parameter) for chunk in model for name, parameter in chunk.named_parameters()]
    wrong = [name for name, parameter in parameters if not bool(torch.isfinite(parameter).all())]
    found = torch.tensor([len(wrong)], dtype=torch.int64, device="cuda")
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    if found.item() > 0:
        example = f", such as {wrong[0].removeprefix('module.')}" if wrong else ""
        raise _stop(f"{found.item()} parameters of {where} are not finite{example}")


def _stop(reason: str) -> MoREError:
    """Return the error that ends the run, with what to do about it."""
    args = get_args()
    folder = args.save or args.load
    clean = newest_clean_iteration(Path(folder)) if folder and args.ckpt_format == "torch_dist" else None
    remedy = (
        "there is no checkpoint with finite parameters to continue from"
        if clean is None
        else f"--ckpt-step {clean} continues from the newest checkpoint whose parameters are finite"
    )
    return MoREError(f"{reason}; nothing was saved of it; {remedy}")


_VALIDATE_RESULT = RerunStateMachine.validate_result
_SHOULD_CHECKPOINT_AND_EXIT = RerunStateMachine.should_checkpoint_and_exit


def _validate_result(
    self: RerunStateMachine,
    result: Any,
    rejection_func: Callable[[Any], bool],
    message: str,
    *args: Any,
    fatal: bool = True,
    **kwargs: Any,
) -> None:
    """Validate as Megatron does, and the first step of a process, too."""
    unchecked = self.mode is RerunMode.VALIDATE_RESULTS and not self.first_iteration_complete
    if unchecked and fatal and rejection_func(result):
        raise _stop(f"iteration {get_args().curr_iteration + 1}: {message}")
    _VALIDATE_RESULT(self, result, rejection_func, message, *args, fatal=fatal, **kwargs)


def _should_checkpoint_and_exit(self: RerunStateMachine) -> tuple[bool, bool, int]:
    """Decide as Megatron does, and end the run here where it is to end."""
    save, leave, code = _SHOULD_CHECKPOINT_AND_EXIT(self)
    if leave:
        call = self.failed_validation_call
        found = call.caller.message if call is not None else "found on another rank"
        raise _stop(f"iteration {get_args().curr_iteration + 1}: {found}")
    return save, leave, code


FINITE = (
    StandIn(
        "megatron.core.rerun_state_machine:RerunStateMachine",
        "validate_result",
        _validate_result,
        "the first step of every start is not checked, and parameters that are not finite are stepped with",
        "core/rerun_state_machine.py",
        "# Do not validate results on the first iteration",
    ),
    StandIn(
        "megatron.core.rerun_state_machine:RerunStateMachine",
        "should_checkpoint_and_exit",
        _should_checkpoint_and_exit,
        "it saves the iteration that failed and names it in the tracker, from where the same command fails again",
        "core/rerun_state_machine.py",
        "return True, True, EXIT_CODE_RESUME_TO_DISAMBIGUATE",
    ),
)
