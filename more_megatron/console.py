"""What a run shows on the console: while it starts, our own lines; what Megatron says then goes into a file.

Megatron lists some 700 arguments and every bucket of gradients before the first step. From the first line of its log
on, all that it says is shown, but for what says nothing.
"""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import IO, Any

VERBOSE = "--verbose-start"
LOG = "start.log"

# Of Megatron's lines at the start: which checkpoint the run goes on from, and what it warns of.
_SHOWN = re.compile(r"^\s*(loading|could not|successfully loaded) .*checkpoint|^WARNING: the ")
# And later: counters of batches, modes of a debugging aid, differences between ranks that are meant to be.
_NOISE = re.compile(
    r"^Evaluating (on|iter) |rerun_state_machine:(Setting|Result|RerunStateMachine)|common state dict differs"
    r"|MCore's async save is deprecated|^Overwriting rerun_state_machine"
)


def say(line: str) -> None:
    """Print a line of ours on rank 0, also while a run starts."""
    if _is_rank_0():
        show = getattr(sys.stdout, "show", None) or sys.stdout.write
        show(f"{line}\n")
        sys.stdout.flush()


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def quiet_start() -> None:
    """Keep what is printed from now on, and warnings, off the console, unless the command line says otherwise."""
    if not {VERBOSE, "--help", "-h"}.isdisjoint(sys.argv):
        return
    console: Any = _Console(sys.stdout)
    sys.stdout = console
    shown = warnings.showwarning

    def keep(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if not console.starts and not issubclass(category, FutureWarning):
            shown(message, category, filename, lineno, file, line)
        else:
            console.keep(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = keep


def write_start_to(folder: str | None) -> None:
    """Write what rank 0 has kept, and will keep, into a file of the folder that a run saves in; nowhere without one.

    What other ranks say at the start, the timers of the last one above all, is dropped: --verbose-start shows it.
    """
    if isinstance(sys.stdout, _Console):
        sys.stdout.write_to(Path(folder, LOG) if folder and _is_rank_0() else Path(os.devnull))
        say(f"> what Megatron says of the start: {Path(folder, LOG)}" if folder else f"> more on the start: {VERBOSE}")


def start_is_over() -> None:
    """Show what is printed from now on."""
    if isinstance(sys.stdout, _Console):
        sys.stdout.starts = False


class _Console:
    """A standard output that shows some lines and keeps the others."""

    def __init__(self, stream: IO[str]) -> None:
        self.starts = True
        self._stream = stream
        self._file: IO[str] | None = None
        self._kept: list[str] = []
        self._line = ""

    def write(self, text: str) -> int:
        """Show or keep each line of a text; an unfinished one waits for its end, or until it is flushed."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            is_shown = _SHOWN.search(line) if self.starts else not _NOISE.search(line)
            (self.show if is_shown else self.keep)(f"{line}\n")
        return len(text)

    def show(self, text: str) -> None:
        """Write to the standard output itself."""
        self._stream.write(text)

    def keep(self, text: str) -> None:
        """Write to the file, or keep the text until there is one."""
        file = self._file  # A local, which the error of a full disk is named after.
        if file is None:
            self._kept.append(text)
        else:
            file.write(text)

    def write_to(self, path: Path) -> None:
        """Append what was kept and will be kept to a file."""
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open until the process ends
        kept, self._kept = self._kept, []
        for text in kept:
            self.keep(text)

    def flush(self) -> None:
        """Show at once what has been written."""
        if self._line and not self.starts:
            self.show(self._line)
            self._line = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
