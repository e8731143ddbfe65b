"""Numbers that are not finite end a run: nothing of them is stepped with, saved or loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.training import get_args

from more_megatron.checkpoint_files import newest_clean_iteration
from more_megatron.errors import MoREError
from more_megatron.platform.stand_in import Table

FINITE = Table()


def check_parameters(model: Sequence[torch.nn.Module], where: str) -> None:
    """Check that the parameters of all ranks are finite. Called on every rank.

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
        raise non_finite_stop(f"{found.item()} parameters of {where} are not finite{example}")


def non_finite_stop(reason: str) -> MoREError:
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


class Tracer:
    """Looks where the first number came from that is not finite; this one does not look."""

    def begin(self) -> None:
        """Look at the step that is computed next: for the second time, after its loss was not finite."""

    def explain(self, here: bool) -> str:
        """Return what to add to the reason of a stop. Unless this rank alone asks, all do, and get the same answer."""
        return ""


_tracer = Tracer()


def trace_reruns(tracer: Tracer) -> None:
    """Let a tracer look closer when a step fails."""
    global _tracer
    _tracer = tracer


@FINITE.surrounds(
    "megatron.core.rerun_state_machine:RerunStateMachine.should_run_forward_backward",
    why="nobody can look where the numbers came from when it computes a step that failed a second time",
    text="self.state = RerunState.RERUNNING_IN_PLACE",
)
def _should_run_forward_backward(former: Any, self: RerunStateMachine, *args: Any) -> bool:
    runs = former(self, *args)
    if runs and self.state is RerunState.RERUNNING_IN_PLACE:
        _tracer.begin()
    return runs


@FINITE.surrounds(
    "megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
    why="the first step of every start is not checked, and parameters that are not finite are stepped with",
    text="# Do not validate results on the first iteration",
)
def _validate_result(
    former: Any,
    self: RerunStateMachine,
    result: Any,
    rejection_func: Callable[[Any], bool],
    message: str,
    *args: Any,
    fatal: bool = True,
    **kwargs: Any,
) -> None:
    unchecked = self.mode is RerunMode.VALIDATE_RESULTS and not self.first_iteration_complete
    if unchecked and fatal and rejection_func(result):
        raise _stop_of_step(message, here=True)
    former(self, result, rejection_func, message, *args, fatal=fatal, **kwargs)


@FINITE.surrounds(
    "megatron.core.rerun_state_machine:RerunStateMachine.should_checkpoint_and_exit",
    why="it saves the iteration that failed and names it in the tracker, from where the same command fails again",
    text="return True, True, EXIT_CODE_RESUME_TO_DISAMBIGUATE",
)
def _should_checkpoint_and_exit(former: Any, self: RerunStateMachine) -> tuple[bool, bool, int]:
    save, leave, code = former(self)
    if leave:
        call = self.failed_validation_call
        raise _stop_of_step(call.caller.message if call is not None else "found on another rank", here=False)
    return save, leave, code


def _stop_of_step(found: str, here: bool) -> MoREError:
    return non_finite_stop(f"iteration {get_args().curr_iteration + 1}: {found}{_tracer.explain(here)}")
