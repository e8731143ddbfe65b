"""Pretrain a MoRE model: `torchrun pretrain_more.py ...`, with Megatron's flags and the MoRE group."""

import os
import time

_PROGRAM_START = time.time()


def main() -> None:
    """Hand Megatron's `pretrain` our model, data and loss."""
    from more_megatron.lifetime import check_launcher, orderly_end
    from more_megatron.platform import initialize_platform

    check_launcher()
    platform = initialize_platform()

    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps

    from more_megatron.output_folders import output_folders
    from more_megatron.training.arguments import parse_arguments
    from more_megatron.training.checkpoints import check_checkpoint
    from more_megatron.training.data_checks import check_data
    from more_megatron.training.model import model_config_from_args, pretrain_arguments
    from more_megatron.training.reporting import prepare_reports

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    args = parse_arguments(platform)
    model_config = model_config_from_args(args)
    check_data(args)
    with orderly_end(), output_folders(args):
        check_checkpoint(args)
        prepare_reports(model_config.transformer, args)
        wrapped_pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
        wrapped_pretrain(*pretrain_arguments(args, model_config), store=store)


# The processes that write checkpoints read this file as well, and need nothing of it.
if __name__ == "__main__":
    # A warning of PyTorch's C++ is a backtrace of 12 lines.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from more_megatron.console import quiet_start
    from more_megatron.errors import one_line_errors, say_that_another_ended
    from more_megatron.lifetime import end_with_launcher, forks_end_with_this, how_to_continue, say_at_sigterm

    end_with_launcher()
    forks_end_with_this()
    say_at_sigterm(lambda: say_that_another_ended("pretrain_more.py"))
    quiet_start()
    with one_line_errors("pretrain_more.py", how_to_continue):
        main()
