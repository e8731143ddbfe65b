"""Ends a rank in the middle of something, at a moment that a test chooses.

Each function is given to `Program` as `prepare`: it sets a trap in the rank before the program starts.
"""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing, training

_SAVE = 2
_STEP = 3


def _kill() -> None:
    # A rank has a group of its own, with the processes that write for it.
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _at_call(number: int, holder: Any, name: str, act: Callable[..., Any]) -> None:
    """Replace a function: its n-th call is `act`, given the original and the arguments."""
    original = getattr(holder, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return act(original, *args, **kwargs) if calls == number else original(*args, **kwargs)

    setattr(holder, name, counted)


def kill_in_data_file() -> None:
    """End the rank when the first tensors of the checkpoint of iteration 4 are written, and half of the next."""
    original = filesystem_async._write_item
    written = 0

    # Megatron looks at the signature.
    @functools.wraps(original)
    def write_item(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        result = original(*args, **kwargs)
        stream = next(argument for argument in args if hasattr(argument, "truncate"))
        written += "iter_0000004" in str(stream.name)
        if written == 3:
            stream.flush()
            stream.truncate(stream.tell() - 100)
            _kill()
        return result

    filesystem_async._write_item = write_item


def kill_before_checkpoint_is_complete() -> None:
    """End the rank when the second checkpoint lacks nothing but the file that says it is complete."""
    _at_call(_SAVE, serialization, "save_config", lambda *args: _kill())


def kill_before_tracker() -> None:
    """End the rank between the second checkpoint and its entry in the tracker file."""
    _trap_tracker(lambda path: _kill())


def kill_in_tracker() -> None:
    """End the rank when the tracker file is open and empty."""

    def act(path: Path) -> None:
        path.write_text("")
        _kill()

    _trap_tracker(act)


def _trap_tracker(act: Callable[[Path], None]) -> None:
    original = checkpointing.maybe_msc.open
    writes = 0

    def open_(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal writes
        if str(path).endswith("latest_checkpointed_iteration.txt") and mode == "w":
            writes += 1
            if writes == _SAVE:
                act(Path(path))
        return original(path, mode, *args, **kwargs)

    checkpointing.maybe_msc.open = open_


def kill_in_index_cache() -> None:
    """End the rank when half of a dataset index is written."""

    def act(original: Any, path: Any, array: np.ndarray, **kwargs: Any) -> None:
        original(path, array, **kwargs)
        with open(path, "r+b") as stream:
            stream.truncate(os.path.getsize(path) // 2)
        _kill()

    _at_call(3, np, "save", act)


def terminate_after_step() -> None:
    """Send the rank a SIGTERM after its third step."""
    _terminate_after_step(lambda: os.kill(os.getpid(), signal.SIGTERM))


def terminate_all_after_step() -> None:
    """Send the rank, and the processes that write for it, a SIGTERM after its third step."""
    _terminate_after_step(lambda: os.killpg(os.getpgid(0), signal.SIGTERM))


def _terminate_after_step(send: Callable[[], None]) -> None:

    def act(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        send()
        return result

    _at_call(_STEP, training, "train_step", act)


def spoil_first_step() -> None:
    """Put a NaN into a parameter before the first step of the process."""
    _at_call(1, training, "train_step", _spoiled)


def spoil_third_step() -> None:
    """Put a NaN into a parameter before the third step of the process."""
    _at_call(_STEP, training, "train_step", _spoiled)


def spoil_unused_row() -> None:
    """Put an infinity where no token looks, after the third step: losses stay finite."""

    def act(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        embedding = next(p for name, p in args[2][0].named_parameters() if "word_embeddings" in name)
        embedding.data[-1, 0] = float("inf")
        return result

    _at_call(_STEP, training, "train_step", act)


def _spoiled(original: Any, *args: Any, **kwargs: Any) -> Any:
    parameter = next(p for name, p in args[2][0].named_parameters() if "layernorm" in name)
    parameter.data[0] = float("nan")
    return original(*args, **kwargs)


def refuse_writing() -> None:
    """Fail to write the checkpoint of iteration 4, as on a full disk."""
    original = filesystem_async._write_item

    @functools.wraps(original)
    def write_item(*args: Any, **kwargs: Any) -> Any:
        stream = next(argument for argument in args if hasattr(argument, "truncate"))
        if "iter_0000004" in str(stream.name):
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    filesystem_async._write_item = write_item
