"""Loading and saving around Megatron's own: nothing in a checkpoint is run, and what is wrong ends in one line."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.training import checkpointing, get_args, global_vars
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from more_megatron.checkpoint_files import clear_for_save, newest_complete_iteration
from more_megatron.console import say, start_is_over
from more_megatron.errors import MoREError, is_out_of_space, last_line
from more_megatron.output_folders import check_still_held
from more_megatron.pickles import load_strictly, read_metadata
from more_megatron.platform.repairs.finite import check_parameters
from more_megatron.platform.stand_in import Table

CHECKPOINTING = Table()


@CHECKPOINTING.replaces(
    "torch.distributed.checkpoint:FileSystemReader.read_metadata",
    why="it runs whatever a pickle names, and believes the file names in it",
    text="return FileSystemReader(checkpoint_dir)",
    file="core/dist_checkpointing/strategies/torch.py",
)
def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """Read the index of a checkpoint as PyTorch does, but build only what belongs into one."""
    metadata = read_metadata(Path(self.path))
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    assert metadata.storage_meta is not None
    metadata.storage_meta.load_id = self.load_id
    return metadata


@CHECKPOINTING.replaces(
    "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
    why="it runs whatever a pickle names",
    text="class MCoreLoadPlanner(DefaultLoadPlanner):",
    file="core/dist_checkpointing/strategies/torch.py",
)
def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Load an object that is no tensor as PyTorch does, but build only what Megatron declares safe."""
    name = read_item.dest_index.fqn
    try:
        content = load_strictly(value)
    except MoREError as error:
        raise MoREError(f"{name} in the checkpoint is not loaded: {error}") from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], content)
    else:
        self.state_dict[name] = content


@CHECKPOINTING.surrounds(
    "megatron.training.checkpointing:read_metadata",
    why="where the tracker file names a release, --ckpt-step is read and not obeyed",
    text="checkpoint_name = get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)",
)
def _tracker_entry(former: Any, tracker_filename: str) -> tuple[int, bool]:
    """Return what the tracker file names, unless `--ckpt-step` names another: a release does not stand above it."""
    arguments = global_vars._GLOBAL_ARGS  # None while arguments are read from a checkpoint
    step = arguments.ckpt_step if arguments is not None else None
    return (step, False) if step else former(tracker_filename)


@CHECKPOINTING.surrounds(
    "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
    why="it counts samples: with another batch size or schedule the learning rate jumps without a word",
    text="lr_decay_steps = args.lr_decay_iters * args.global_batch_size",
    file="training/training.py",
)
def _load_schedule(former: Any, self: OptimizerParamScheduler, state_dict: dict[str, Any]) -> None:
    """Load as Megatron does, and say so where the learning rate does not go on from where it was."""
    before = get_canonical_lr_for_logging(self.optimizer.param_groups)
    former(self, state_dict)
    after = get_canonical_lr_for_logging(self.optimizer.param_groups)
    if before is not None and after is not None and abs(after - before) > 1e-6 * abs(before):
        say(f"WARNING: the learning rate goes from {before:.6E} in the checkpoint to {after:.6E}")


@CHECKPOINTING.surrounds(
    "megatron.training.training:load_checkpoint",
    why="errors of reading are tracebacks of all ranks, and parameters that are not finite are taken",
    text="module.load_state_dict(state_dict, strict=strict)",
    file="training/checkpointing.py",
)
def _load_checkpoint(former: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        loaded = former(model, *args, **kwargs)
    except (Exception, CheckpointException, SystemExit) as error:
        detail = last_line(error)
        remedy = "load an older one with --ckpt-step, or MORE_TRACEBACK=1 shows where it failed"
        if "OptimizerParamScheduler" in detail:
            remedy = "--override-opt-param-scheduler takes the schedule that the flags describe"
        raise MoREError(f"the checkpoint in {get_args().load} cannot be loaded: {detail}; {remedy}") from error
    check_parameters(model, f"the checkpoint in {get_args().load}")
    return loaded


_withheld_interval: int | None = None


def _withhold_interval(arguments: Any) -> None:
    """Keep `--save-retain-interval` from Megatron while the tracker file names no iteration, as after a conversion.

    It would take the entry for the number of a checkpoint to delete.
    """
    global _withheld_interval
    arguments.save_retain_interval = arguments.save_retain_interval or _withheld_interval
    tracker = Path(checkpointing.get_checkpoint_tracker_filename(arguments.save))
    if tracker.is_file() and not tracker.read_text(errors="replace").strip().isdecimal():
        _withheld_interval, arguments.save_retain_interval = arguments.save_retain_interval, None


@CHECKPOINTING.surrounds(
    "megatron.training.training:save_checkpoint",
    why="it writes into what an older run or a kill left, and parameters that are not finite",
    text="# TODO Handle non-empty directories (e.g., after a crash during saving).",
    file="training/checkpointing.py",
)
def _save_checkpoint(former: Any, iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
    start_is_over()
    arguments = get_args()
    check_parameters(model, f"the model of iteration {iteration}")
    check_still_held()
    _withhold_interval(arguments)
    # Other ranks write only after they have exchanged plans with rank 0.
    if arguments.rank == 0 and arguments.ckpt_format == "torch_dist" and not kwargs.get("non_persistent_ckpt"):
        clear_for_save(Path(arguments.save), iteration)
    with _one_line_on_failure(f"the checkpoint of iteration {iteration}"):
        return former(iteration, model, *args, **kwargs)


@CHECKPOINTING.surrounds(
    "megatron.training.training:maybe_finalize_async_save",
    why="errors of writing are tracebacks of all ranks",
    text="maybe_finalize_async_save(blocking=True, terminate=True)",
)
def _finalize(former: Any, *args: Any, **kwargs: Any) -> Any:
    with _one_line_on_failure("a checkpoint in the background"):
        return former(*args, **kwargs)


@contextlib.contextmanager
def _one_line_on_failure(what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        folder = get_args().save
        complete = newest_complete_iteration(Path(folder))
        kept = "none is complete yet" if complete is None else f"that of iteration {complete} is complete"
        remedy = f"{'make room, ' if is_out_of_space(error) else ''}start the same command again"
        raise MoREError(f"{what} cannot be saved in {folder}: {last_line(error)}; {kept}; {remedy}") from error
