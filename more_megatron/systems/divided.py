"""What systems share whose layers divide into a prelude, a core of groups that are repeated, and a coda."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.blocks.refusals import loop_refusals
from more_megatron.systems.base import System
from more_megatron.systems.export import MODEL, Row, adapter_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Group, Layer, Loop

    Layers = Sequence[Layer]


class DividedSystem(System):
    """Layers of which some are repeated, with or without their input injected."""

    injection: ClassVar[str]  # how the input of a group enters its passes if no flag says it
    fields: ClassVar[Mapping[str, str]] = {
        "prelude_layers": "recurrence_prelude_layers",
        "coda_layers": "recurrence_coda_layers",
        "injection": "recurrence_injection",
    }

    def around(self, config: Any) -> int:
        """Return the default of the layers of prelude and coda, given `num_layers`."""
        return 0

    def unrolled(self, config: MoREConfig, steps: int) -> int:
        """Return the number of layers that a token passes if each group is repeated `steps` times."""
        prelude, coda = self._prelude_and_coda(config)
        return prelude + (config.num_layers - prelude - coda) * steps + coda

    def arrange(self, config: MoREConfig, once: Layers, repeated: Layers, loop: Loop) -> tuple[Group, ...]:
        """Return the groups of a stack, given each layer of the model as it is if it runs once, and if repeated."""
        from more_megatron.model.stack import Group

        prelude, coda = self._prelude_and_coda(config)
        end = config.num_layers - coda
        size = config.recurrence_group_layers or end - prelude
        groups = [
            Group(tuple(once[:prelude])),
            *(Group(tuple(repeated[start : start + size]), loop) for start in range(prelude, end, size)),
            Group(tuple(once[end:])),
        ]
        return tuple(group for group in groups if group.layers)

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        prelude, coda = self._prelude_and_coda(config)
        group, core = config.recurrence_group_layers, config.num_layers - prelude - coda
        if core < 1:
            yield (
                f"has no layer to repeat: --recurrence-prelude-layers {prelude} and --recurrence-coda-layers {coda} "
                f"must leave one of --num-layers {config.num_layers}"
            )
        elif core % (group or core) != 0:
            yield (
                f"repeats {core} layers, --num-layers {config.num_layers} without prelude and coda, which "
                f"--recurrence-group-layers {group} does not divide: change one of them"
            )
        yield from loop_refusals(config)

    def _prelude_and_coda(self, config: MoREConfig) -> tuple[int, int]:
        prelude, coda, default = config.recurrence_prelude_layers, config.recurrence_coda_layers, self.around(config)
        return default if prelude is None else prelude, default if coda is None else coda

    def config_fields(self, args: Any) -> dict[str, Any]:
        found, around = super().config_fields(args), self.around(args)
        default = {"prelude_layers": around, "coda_layers": around, "injection": self.injection}
        return {name: default.get(name) if value is None else value for name, value in found.items()}

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        return (*MODEL, *adapter_rows(config))
