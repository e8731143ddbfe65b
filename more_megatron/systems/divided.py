"""What systems share whose layers divide into a prelude, groups that are repeated, and a coda."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import System
from more_megatron.systems.export import MODEL, Row, adapter_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig

__all__ = ["DividedSystem"]


class DividedSystem(System):
    """Layers of which some are repeated, with or without their input injected."""

    injection: ClassVar[str]
    """How the input of a group enters its passes if no flag says it."""

    fields: ClassVar[Mapping[str, str]] = {
        "prelude_layers": "recurrence_prelude_layers",
        "coda_layers": "recurrence_coda_layers",
        "injection": "recurrence_injection",
    }

    def around(self, config: Any) -> int:
        """Return the default of the layers of prelude and coda, given `num_layers`."""
        return 0

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        from more_megatron.blocks.refusals import loop_refusals
        from more_megatron.model.division import division_refusals

        yield from division_refusals(config, self.around(config))
        yield from loop_refusals(config)

    def config_fields(self, args: Any) -> dict[str, Any]:
        found, around = super().config_fields(args), self.around(args)
        default = {"prelude_layers": around, "coda_layers": around, "injection": self.injection}
        return {name: default.get(name) if value is None else value for name, value in found.items()}

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        return (*MODEL, *adapter_rows(config))
