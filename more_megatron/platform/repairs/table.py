"""All repairs of the wheel. Importing this module imports `megatron.training`."""

from typing import Any

from more_megatron.platform.repairs.checkpoint_writer import CHECKPOINT_WRITER
from more_megatron.platform.repairs.checkpointing import CHECKPOINTING
from more_megatron.platform.repairs.failed_writes import CALLERS, WRITERS
from more_megatron.platform.repairs.finite import FINITE
from more_megatron.platform.repairs.optimizer import OPTIMIZER
from more_megatron.platform.repairs.reports import REPORTS
from more_megatron.platform.stand_in import Table

WHEEL_REPAIRS = Table((*OPTIMIZER, *REPORTS, *CHECKPOINT_WRITER, *CHECKPOINTING, *FINITE, *WRITERS, *CALLERS))


@WHEEL_REPAIRS.surrounds(
    "megatron.core.datasets.utils:compile_helpers",
    why="it runs make in a folder that has no Makefile, although the compiled helper is shipped",
    text='command = ["make", "-C"',
)
def _compile_helpers_if_missing(former: Any) -> None:
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        former()
