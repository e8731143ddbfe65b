"""How the layers of a model divide into a prelude, a core of groups that are repeated, and a coda."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from more_megatron.config import MoREConfig
from more_megatron.flags import flag
from more_megatron.model.stack import Group, Layer, Loop

__all__ = ["Division", "division_refusals"]


@dataclass(frozen=True)
class Division:
    """Numbers of layers; their sum is that of the model.

    Attributes:
        prelude: Layers in front of the core, run once.
        group: Layers of each group of the core.
        groups: Groups of the core, each repeated before the next begins.
        coda: Layers behind the core, run once.
    """

    prelude: int
    group: int
    groups: int
    coda: int

    @classmethod
    def of(cls, config: MoREConfig, around: int = 0) -> Division:
        """Return the division that the flags ask for; `division_refusals` says whether there is one.

        Args:
            config: Model configuration.
            around: Default of the layers of the prelude, and of those of the coda.
        """
        prelude, coda = _around(config, around)
        core = config.num_layers - prelude - coda
        group = config.recurrence_group_layers or core
        return cls(prelude, group, core // group, coda)

    def unrolled(self, steps: int) -> int:
        """Return the number of layers that a token passes if each group is repeated `steps` times."""
        return self.prelude + self.groups * self.group * steps + self.coda

    def arrange(self, once: Sequence[Layer], repeated: Sequence[Layer], loop: Loop) -> tuple[Group, ...]:
        """Return the groups of a stack.

        Args:
            once: For each layer of the model, how it is built if it runs once.
            repeated: For each layer of the model, how it is built if it is repeated.
            loop: How the groups of the core are repeated.
        """
        starts = [self.prelude + number * self.group for number in range(self.groups)]
        end = self.prelude + self.groups * self.group
        groups = [
            Group(tuple(once[: self.prelude])),
            *(Group(tuple(repeated[start : start + self.group]), loop) for start in starts),
            Group(tuple(once[end:])),
        ]
        return tuple(group for group in groups if group.layers)


def division_refusals(config: MoREConfig, around: int = 0) -> Iterator[str]:
    """Yield what is wrong with the division that the flags ask for, each one line for `System.refusals`.

    Args:
        config: Model configuration.
        around: Default of the layers of the prelude, and of those of the coda.
    """
    prelude, coda = _around(config, around)
    core = config.num_layers - prelude - coda
    for name, value, least in (
        ("recurrence_prelude_layers", prelude, 0),
        ("recurrence_coda_layers", coda, 0),
        ("recurrence_group_layers", config.recurrence_group_layers, 1),
    ):
        if value is not None and value < least:
            yield f"cannot have {flag(name)} {value}: it must be at least {least}"
    if core < 1:
        yield (
            f"has no layer to repeat: --recurrence-prelude-layers {prelude} and --recurrence-coda-layers {coda} must "
            f"leave one of --num-layers {config.num_layers}"
        )
    elif core % (config.recurrence_group_layers or core) != 0:
        yield (
            f"repeats {core} layers, --num-layers {config.num_layers} without prelude and coda, which "
            f"--recurrence-group-layers {config.recurrence_group_layers} does not divide: change one of them"
        )


def _around(config: MoREConfig, default: int) -> tuple[int, int]:
    """Return the numbers of layers of the prelude and of the coda."""
    prelude, coda = config.recurrence_prelude_layers, config.recurrence_coda_layers
    return default if prelude is None else prelude, default if coda is None else coda
