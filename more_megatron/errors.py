"""How a program ends on an error, whatever it is: the first rank that meets it prints one line, no traceback."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["MoREError", "last_line", "one_line", "one_line_errors"]

_ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_SECONDS = 10.0
_STORE_SECONDS = 5.0
_MOST_CHARACTERS = 600
_INTERRUPTED = 130
_UNSAFE = "Weights only load failed"

# What an error that nobody foresaw means, by its text.
_REMEDIES = (
    (
        r"out of memory|can't allocate memory|not enough memory|Unable to allocate|MemoryError|bad_alloc"
        r"|Storage size calculation overflowed|array is too big",
        "it does not fit into memory: lower a size or --micro-batch-size, recompute, or divide the model further",
    ),
    (
        r"onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL communicator was aborted",
        "another rank has ended: its own line says why, or it was killed, most often for lack of memory",
    ),
    (r"No space left|Disk quota", "make room and start the same command again"),
    (r"Timed out|[Tt]imeout", "a rank hangs or is slow: --distributed-timeout-minutes waits longer"),
)


class MoREError(ValueError):
    """A wrong flag, file, checkpoint or layout. The message says what, where and how to mend it."""


def last_line(error: BaseException) -> str:
    """Return the kind of an error and the last line of its text: those of checkpoints hold whole tracebacks."""
    if _UNSAFE in str(error):  # PyTorch goes on to say how to run it.
        return "it is damaged, or holds more than data and could run code"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no further message'}"


def one_line(error: BaseException) -> str:
    """Return what an error says in one line: what it is, where it came from, and how to mend it where that is known."""
    text = " ".join(str(error).split())
    if isinstance(error, MoREError):
        return text
    kind, found = type(error).__name__, traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if "Traceback (most recent call last)" in text or _UNSAFE in text:
        text = last_line(error)
    if not text and found:
        text = found[-1].line or ""
    remedy = next((f"; {remedy}" for pattern, remedy in _REMEDIES if re.search(pattern, f"{kind} {text}")), "")
    shortened = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
    where = f" at {_short(found[-1].filename)}:{found[-1].lineno}" if found else ""
    return f"{shortened}{remedy} ({kind}{where}; MORE_TRACEBACK=1 shows the way there)"


def _short(file: str) -> str:
    """Return a file's path from the folder of packages, or of this project, on."""
    _, packages, inside = file.rpartition("site-packages/")
    return inside if packages else file.removeprefix(f"{_ROOT}/")


@contextlib.contextmanager
def one_line_errors(program: str, continuation: Callable[[], str] = str) -> Iterator[None]:
    """End the process with one line on standard error, whatever the block raises.

    Every rank exits with a code that is not 0. The first one that meets an error reports it: what the others meet is
    mostly its consequence. Set `MORE_TRACEBACK=1` to see where errors came from.

    Args:
        program: Name the line begins with.
        continuation: Says how to go on after Ctrl-C, or nothing.
    """
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if os.environ.get("MORE_TRACEBACK") == "1" and not interrupted:
            raise
        with contextlib.suppress(Exception):
            if _speaks():
                line = f"interrupted{continuation()}" if interrupted else f"error: {one_line(error)}"
                print(f"{program}: {line}", file=sys.stderr, flush=True)
            else:  # The launcher ends all ranks with the first that leaves: not before the other has spoken.
                time.sleep(_PATIENCE_SECONDS)
            sys.stdout.flush()
        # Not sys.exit: pending collectives of the other ranks must not hold this one back.
        os._exit(_INTERRUPTED if interrupted else 1)


def _speaks() -> bool:
    """Return whether no other rank of this launch has reported an error.

    The store that the ranks share counts them. Without one, as before it is there or after it has gone, rank 0 speaks;
    the launcher ends the others while they wait for it.
    """
    if "RANK" not in os.environ:
        return True
    try:
        return _store().add(f"more_megatron errors {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except Exception:
        if os.environ["RANK"] != "0":
            time.sleep(_PATIENCE_SECONDS)
        return True


def _store():  # type: ignore[no-untyped-def]
    from datetime import timedelta

    import torch.distributed as dist

    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise RuntimeError("there is no store yet")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
