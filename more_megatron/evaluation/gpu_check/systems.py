"""The one place where the check asks the registry which systems there are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Candidate", "candidates"]


@dataclass(frozen=True)
class Candidate:
    """A system that is checked.

    Attributes:
        name: Its name.
        recurrent: Whether its depth comes from recurrence.
    """

    name: str
    recurrent: bool


def candidates() -> list[Candidate]:
    """Return all systems, the baseline first. Imports Megatron."""
    from more_megatron.variants import VARIANTS

    return [Candidate(name, variant.recurrent) for name, variant in VARIANTS.items()]
