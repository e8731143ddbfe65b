"""How a program ends on an error, whatever it is: the first rank that meets it prints one line, no traceback."""

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

_ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_SECONDS = 10.0
_STORE_SECONDS = 5.0
_SECONDS_TO_SPEAK = 1.0
_MOST_CHARACTERS = 600
_INTERRUPTED = 130
_UNSAFE = "Weights only load failed"
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|nan)$", re.IGNORECASE)
# What the system, NumPy and PyTorch say of a disk without room.
_FULL = r"No space left|Disk quota|File too large|requested and \d+ written|StreamWriter failed|unexpected pos \d"

# What an error that nobody foresaw means, by its text and the files that it came through.
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
    (r"SimpleNamespace' object|yaml_arguments", "--yaml-cfg must name all arguments of Megatron: flags are shorter"),
    (r"middle PP stages", "change --decoder-first-pipeline-num-layers or its kin, or --pipeline-model-parallel-size"),
    (r"environment variable \w+ expected", "start it with torchrun, as README.md does, which sets it"),
    (r"EADDRINUSE|address already in use", "another program has this port: torchrun --master-port takes another"),
    (r"Too many open files|init uv loop", "allow more of them: ulimit -n"),
    (r"No closing quotation|No escaped character", "close the quotes of the flags that are given in one string"),
    (_FULL, "make room and start the same command again"),
    (
        r"megatron/core/tokenizers/",
        "the tokenizer cannot be loaded: give --tokenizer-type and --tokenizer-model or files as in preprocessing",
    ),
    (
        r"eval_global_batch_size",
        "they are those of training where they are not given: change --global-batch-size or --micro-batch-size",
    ),
    (r"Timed out|[Tt]imeout", "a rank hangs or is slow: --distributed-timeout-minutes waits longer"),
)


class MoREError(ValueError):
    """A wrong flag, file, checkpoint or layout. The message says what, where and how to mend it."""


def last_line(error: BaseException) -> str:
    """Return the kind of an error and the last line of its text: those of checkpoints hold whole tracebacks.

    A `MoREError` says all by itself.
    """
    if isinstance(error, MoREError):
        return str(error)
    if _UNSAFE in str(error):  # PyTorch goes on to say how to run it.
        return "it is damaged, or holds more than data and could run code"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    file = _file_of(error)
    said = lines[-1] if lines else _condition(error) or "no further message"
    return f"{type(error).__name__}: {f'{file}: ' if file else ''}{said}"


def one_line(error: BaseException) -> str:
    """Return what an error says in one line: what it is, where it came from, and how to mend it where that is known."""
    text = " ".join(str(error).split())
    if isinstance(error, MoREError):
        return text
    kind, found, file = type(error).__name__, traceback.extract_tb(error.__traceback__), _file_of(error)
    if "Traceback (most recent call last)" in text or _UNSAFE in text:
        text = last_line(error)
    text = text.partition(". This is typically caused by a remote worker")[0]
    text = text or _condition(error)
    told = f"{kind} {text} {' '.join(_short(frame.filename) for frame in found)}"
    remedy = next((f"; {remedy}" for pattern, remedy in _REMEDIES if re.search(pattern, told)), "")
    where_from = "" if file is None else f"{str(file)[:_MOST_CHARACTERS]}: "
    if isinstance(error, OSError) and file is not None:
        return f"{where_from}{error.strerror or text}{remedy}"
    shortened = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
    where = f" at {_short(found[-1].filename)}:{found[-1].lineno}" if found else ""
    return f"{where_from}{shortened}{remedy} ({kind}{where}; MORE_TRACEBACK=1 shows the way there)"


def is_out_of_space(error: BaseException) -> bool:
    """Return whether an error is of a write for which there was no room."""
    return not isinstance(error, MoREError) and re.search(_FULL, str(error)) is not None


def _file_of(error: BaseException) -> str | None:
    """Return the file that an error is of: that of a write or of content, unlike that of an open, does not name it."""
    named = getattr(error, "filename", None)
    if isinstance(error, OSError) and named is not None:
        return str(named)
    if not (is_out_of_space(error) or isinstance(error, UnicodeDecodeError | json.JSONDecodeError)):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [value for frame in reversed(frames) for value in frame.f_locals.values() if isinstance(value, io.IOBase)]
    return next((name for name in (getattr(file, "name", None) for file in files) if isinstance(name, str)), None)


def _condition(error: BaseException) -> str:
    """Return the line of source that failed without a word, and the values of what it compares."""
    if error.__traceback__ is None:
        return ""
    frame, values = list(traceback.walk_tb(error.__traceback__))[-1][0], {}
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""

    def named(found: re.Match[str]) -> str:
        of, name = found.groups()
        value = getattr(frame.f_locals.get(of), name, frame) if of else frame.f_locals.get(name, frame)
        if not isinstance(value, int | float | str | None):
            return found[0]
        name = f"--{name.replace('_', '-')}" if of == "args" else name
        values[name] = f"{name} is {value}"
        return name

    condition = re.sub(r"\b(?:(args|config|self)\.)?([a-z_]\w*)", named, line.removeprefix("assert "))
    if not line.startswith("assert "):
        return line
    return f"{condition} must hold{', where ' if values else ''}{' and '.join(values.values())}"


def _short(file: str) -> str:
    """Return a file's path from the folder of packages, or of this project, on."""
    _, packages, inside = file.rpartition("site-packages/")
    return inside if packages else file.removeprefix(f"{_ROOT}/")


def speak_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Let a parser raise what is wrong with a command line, and not print the usage of all its flags on every rank.

    Numbers such as -1e-8 and -inf, which argparse takes for flags, are numbers to it.
    """

    def refuse(message: str) -> NoReturn:
        raise MoREError(_with_flags_meant(parser, message))

    parser._negative_number_matcher = _NEGATIVE_NUMBER
    parser.error = refuse  # type: ignore[method-assign]


class OneLineParser(argparse.ArgumentParser):
    """A parser of a tool that ends it with one line where its command line is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # A variable of a shell that is not set. What follows the name of a command is its parser's.
        if arg_string == "" and action.default != "" and not isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(action, "is empty: give it a value or leave it out")
        return super()._get_value(action, arg_string)  # type: ignore[misc]

    def error(self, message: str) -> NoReturn:
        """End the program with what is wrong."""
        self.exit(2, f"{self.prog}: error: {_with_flags_meant(self, message)} (--help lists the flags)\n")


def _with_flags_meant(parser: argparse.ArgumentParser, message: str) -> str:
    """Return what a parser says of a command line, and for flags that it does not know those that are like them."""
    if not message.startswith("unrecognized"):
        return message
    unknown = [word.partition("=")[0] for word in message.split() if word.startswith("-")]
    if not unknown and (first := message.split()[-1]) in sys.argv:
        before = [word for word in sys.argv[: sys.argv.index(first)] if word.startswith("--")]
        return f"{message}, more than {before[-1]} takes" if before else message
    meant = [name for word in unknown for name in difflib.get_close_matches(word, _options(parser), n=1)]
    return f"{message}; did you mean {', '.join(meant)}?" if meant else message


def _options(parser: argparse.ArgumentParser) -> list[str]:
    options = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options += [option for command in action.choices.values() for option in _options(command)]
    return options


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
                if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # The others ask the store, which may be with this one.
                    time.sleep(_SECONDS_TO_SPEAK)
            else:  # The launcher ends all ranks with the first that leaves: not before the other has spoken.
                time.sleep(_SECONDS_TO_SPEAK if interrupted else _PATIENCE_SECONDS)
            sys.stdout.flush()
        # Not sys.exit: pending collectives of the other ranks must not hold this one back.
        os._exit(_INTERRUPTED if interrupted else 1)


def say_that_another_ended(program: str) -> None:
    """Print, where no rank has printed anything, what SIGTERM mostly means to one of several."""
    if _speaks():
        reason = "another rank was killed, most often for lack of memory, or the run was cancelled"
        print(f"{program}: error: ended by SIGTERM: {reason}", file=sys.stderr, flush=True)
    else:  # It may be this rank that speaks.
        time.sleep(_SECONDS_TO_SPEAK)


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
