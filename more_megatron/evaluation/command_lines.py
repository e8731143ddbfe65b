"""Flags of `pretrain_more.py` in tables."""

import re
import shlex
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.systems import flag_names, get_system

# By name without the dashes; True: a switch, a list: several values, None: left out.
Flags = dict[str, Any]


def read_by(system: str, flags: Flags) -> Flags:
    """Return flags without those of the MoRE group that a system never reads, and so refuses."""
    chosen = get_system(system)
    refused = set(flag_names()) - {"more_variant", *chosen.own_flags(), *chosen.reads}
    return {name: value for name, value in flags.items() if name.replace("-", "_") not in refused}


def arguments_of(flags: Flags) -> list[str]:
    """Return flags as arguments of a program."""
    words = []
    for name, value in flags.items():
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(str(part) for part in values if part is not True)]
    return words


def as_typed(flags: Flags) -> str:
    """Return flags as one types them."""
    return shlex.join(arguments_of(flags))


def parse_flags(text: str) -> Flags:
    """Return flags that are given as one types them.

    Raises:
        MoREError: If a word is neither a flag nor follows one.
    """
    given: dict[str, list[str]] = {}
    name = ""
    for word in shlex.split(text):
        if re.match(r"--[a-z]", word):
            name, _, value = word.removeprefix("--").partition("=")
            given[name] = [value] if value else []
        elif not name:
            raise MoREError(f"{word} follows no flag")
        else:
            given[name].append(word)
    return {name: _value(values) for name, values in given.items()}


def _value(words: list[str]) -> Any:
    if not words:
        return True
    return words if len(words) > 1 else words[0]
