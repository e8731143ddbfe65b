"""`loop`: groups of ordinary layers repeated, with or without prelude, coda and injection."""

from __future__ import annotations

from .division import DividedSystem, division_fields
from .fields import Field


class LoopedTransformer(DividedSystem):
    """Megatron's layers in groups, each repeated on its own output."""

    fields = {  # noqa: RUF012
        **division_fields("none"),
        "group_layers": Field(
            int, None, "Layers of a group; None: one group has all that are repeated.", low=1, optional=True
        ),
    }


SYSTEM = LoopedTransformer()
