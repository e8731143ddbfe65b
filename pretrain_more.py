"""Pretrain a MoRE model: `torchrun pretrain_more.py ...`, with Megatron's flags and the MoRE group."""

import time

_PROGRAM_START = time.time()

from more_megatron.errors import one_line_errors  # noqa: E402
from more_megatron.platform import initialize_platform  # noqa: E402

with one_line_errors("pretrain_more.py"):
    platform = initialize_platform()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import inprocess_restart, pretrain, set_startup_timestamps  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from more_megatron.training.arguments import parse_arguments  # noqa: E402
from more_megatron.training.checkpoints import check_checkpoint, refuse_unreadable_checkpoints  # noqa: E402
from more_megatron.training.datasets import DatasetsProvider  # noqa: E402
from more_megatron.training.forward import forward_step  # noqa: E402
from more_megatron.training.model import model_config_from_args  # noqa: E402

if __name__ == "__main__":
    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    with one_line_errors("pretrain_more.py", Exception):
        args = parse_arguments(platform)
        model_config = model_config_from_args(args)
        check_checkpoint(args)
    refuse_unreadable_checkpoints()
    with one_line_errors("pretrain_more.py"):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            DatasetsProvider(model_config.transformer),
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
        )
