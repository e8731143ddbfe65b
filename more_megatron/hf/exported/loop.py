"""`loop`: groups of Megatron's layers, each repeated on its own output, with or without prelude, coda and injection."""

from .fields import Field
from .interface import DividedSystem
from .stack import division_fields

_GROUP = Field(int, None, "Layers of a group; None: one group has all that are repeated.", low=1, optional=True)
SYSTEM = DividedSystem(fields={**division_fields("none"), "group_layers": _GROUP})
