"""What Megatron's trainer reports, under its right name, and only what is true of the systems here."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.training import get_args

from more_megatron.console import say, start_is_over
from more_megatron.platform.stand_in import Table, install

REPORTS = Table()


@REPORTS.surrounds(
    "megatron.training.training:training_log",
    why="losses of the first line are averaged into the second: a resumed run prints others than an uninterrupted one",
    text="should_reset = not is_first_iteration",
)
def _training_log(former: Any, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
    """Log as Megatron does, and begin a new average after a first line that would have come anyway."""
    start_is_over()
    iteration = args[3]
    comes_anyway = iteration % get_args().log_interval == 0
    return former(*args, is_first_iteration=is_first_iteration and not comes_anyway, **kwargs)


@REPORTS.replaces(
    "megatron.training.training:report_theoretical_memory",
    why="it knows plain models in bf16 only: no recurrent state, no repeated activations, no other experts",
    text="report_theoretical_memory(args, num_microbatches=num_microbatches, verbose=True)",
)
def _no_theoretical_memory(*args: Any, **kwargs: Any) -> None:
    """Say nothing: what the process really uses is on the next line."""


@REPORTS.surrounds(
    "megatron.training.training:evaluate_and_print_results",
    why="the test set is reported as validation, and full validation takes a number of iterations for a list",
    text="args.eval_iters = eval_iters[0] if not args.multiple_validation_sets else eval_iters",
)
def _evaluate_and_print_results(former: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
    start_is_over()
    arguments = get_args()
    # With a single full validation set Megatron expects its length in a list.
    if arguments.full_validation and isinstance(arguments.eval_iters, int):
        arguments.eval_iters = [arguments.eval_iters]
    with _as_test(arguments) if prefix.endswith("test set") else contextlib.nullcontext():
        return former(prefix, *args, **kwargs)


@contextlib.contextmanager
def _as_test(arguments: Any) -> Iterator[None]:
    """Let Megatron evaluate one set that is the test's: `--eval-iters` of it, whatever is done with validation sets."""
    own: dict[str, Any] = {"multiple_validation_sets": False, "full_validation": False, "validation_set_names": None}
    own["eval_iters"] = _test_iterations
    before = {name: getattr(arguments, name) for name in own}
    restore = install(TEST_SPLIT)
    vars(arguments).update(own)
    try:
        yield
    finally:
        vars(arguments).update(before)
        restore()


_test_iterations = 0


@REPORTS.surrounds(
    "megatron.training.training:build_train_valid_test_data_loaders",
    why="a list with no validation set in it passes for one",
    text="do_valid = valid_dataloaders is not None and (args.full_validation or args.eval_iters > 0)",
)
def _build_loaders(former: Any, provider: Any) -> Any:
    global _test_iterations
    args = get_args()
    # Lengths of full validation sets take its place.
    _test_iterations = args.eval_iters
    loaders = former(provider)
    validation = loaders[1] or [None]
    # Rank 0 reads data under every layout.
    found = torch.tensor([int(validation[0] is not None)], dtype=torch.long, device="cuda")
    torch.distributed.broadcast(found, 0)
    if args.do_valid and not found.item():
        say("> there are no validation data: nothing is evaluated on them")
        args.do_valid, args.full_validation = 0, False
    return loaders


def _of_the_test(name: str) -> str:
    return name.replace(" validation", " test", 1)


# In place while the test split is evaluated.
TEST_SPLIT = Table()
_NAMED = "every evaluation is named after the validation set, that of the test set too"


@TEST_SPLIT.surrounds(
    "megatron.training.training:get_wandb_writer",
    why=_NAMED,
    text="{'{} validation{}'.format(key, suffix): total_loss_dict[key].item()}, iteration",
)
@TEST_SPLIT.surrounds(
    "megatron.training.training:get_tensorboard_writer",
    why=_NAMED,
    text="writer.add_scalar('{} validation{}'.format(key, suffix)",
)
def _writer(former: Any) -> Any:
    """Return a writer of TensorBoard or Weights & Biases whose curves are those of the test split."""
    writer = former()
    return writer and SimpleNamespace(
        add_scalar=lambda name, *values: writer.add_scalar(_of_the_test(name), *values),
        log=lambda values, step: writer.log({_of_the_test(name): value for name, value in values.items()}, step),
    )


@TEST_SPLIT.surrounds(
    "megatron.training.training:print_rank_last", why=_NAMED, text="string = f' validation{suffix} loss at {prefix} | '"
)
def _print_rank_last(former: Any, text: str) -> None:
    former(_of_the_test(text))
