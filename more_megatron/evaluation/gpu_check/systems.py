"""The one place where this check asks the registry which systems there are."""

from __future__ import annotations

__all__ = ["baseline", "is_recurrent", "system_names"]


def system_names() -> tuple[str, ...]:
    """Return the name of every system."""
    from more_megatron.variants import VARIANTS

    return tuple(VARIANTS)


def baseline() -> str:
    """Return the system that others are compared with: the first of the registry."""
    return system_names()[0]


def is_recurrent(system: str) -> bool:
    """Return whether the depth of a system comes from recurrence."""
    from more_megatron.variants import get_variant

    return get_variant(system).recurrent
