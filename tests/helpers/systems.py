"""What tests that go through all systems need to know of each."""

from collections.abc import Iterable
from typing import Any

import pytest

from more_megatron.systems import get_system
from tests.helpers.models import small_config


def in_two_tiers(systems: Iterable[str], always: int = 3) -> list[Any]:
    """Return the systems as parameters of a slow test: the first ones always, the others in the whole matrix.

    Args:
        systems: Names of systems.
        always: How many are tried always.
    """
    return [
        pytest.param(name, marks=[] if index < always else pytest.mark.matrix) for index, name in enumerate(systems)
    ]


def flags_of(system: str, flags: str = "") -> str:
    """Return `--more-variant SYSTEM` and those of the flags, with their values, that the system reads.

    Args:
        system: Name of the system.
        flags: Flags of the MoRE group, separated by blanks.
    """
    read = {*get_system(system).reads, *get_system(system).own_flags()}
    words = [f"--{part}".split() for part in f" {flags}".split(" --")[1:]]
    kept = [word for name, *values in words if name[2:].replace("-", "_") in read for word in (name, *values)]
    return " ".join(("--more-variant", system, *kept))


def is_one_group(system: str) -> bool:
    """Return whether all layers of a system are one group that is repeated, whatever its flags say."""
    if "recurrence_group_layers" in get_system(system).reads:
        return False
    groups = get_system(system).stack(small_config(system, num_layers=3)).groups
    return len(groups) == 1 and groups[0].loop is not None
