"""The health of a run: every N-th training step is watched, reported, and may end the run.

Megatron calls `train_step` and `checkpoint_and_decide_exit` by their names in its module, where these take their place.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_pg_size, unwrap_model
from megatron.training import get_tensorboard_writer, get_wandb_writer, training
from megatron.training.utils import is_last_rank

from more_megatron.config import MoREConfig
from more_megatron.monitoring import HEALTH_FILE
from more_megatron.monitoring.first_non_finite import FirstNonFinite
from more_megatron.monitoring.gradients import gradient_figures, gradients_of_experts, record_gradients
from more_megatron.monitoring.loss import LossHistory, depth_figures
from more_megatron.monitoring.ranges import Finding, findings, healthy_ranges
from more_megatron.monitoring.recurrence import record_adapter, recurrence_figures
from more_megatron.monitoring.report import Report
from more_megatron.monitoring.routing import routing_figures, routing_loads, watch_router
from more_megatron.monitoring.watch import Key, Watch, watching
from more_megatron.platform.repairs.finite import non_finite_stop, trace_reruns
from more_megatron.platform.training_loop import surround
from more_megatron.systems import get_system
from more_megatron.training.parameter_owners import adapters, parameter_owners


def watch_health(config: MoREConfig, args: argparse.Namespace) -> None:
    """Watch the training that follows, as `--health-interval` says.

    Raises:
        MoREError: If the file of ranges cannot be read.
    """
    health = _Health(config, args)
    if args.health_interval > 0:
        surround("train_step", health.train_step)
        surround("checkpoint_and_decide_exit", health.checkpoint_and_decide_exit)


class _Health:
    def __init__(self, config: MoREConfig, args: argparse.Namespace) -> None:
        self._args = args
        self._system = get_system(config.more_variant)
        self._ranges = healthy_ranges(
            self._system.health_ranges(config),
            Path(args.health_ranges) if args.health_ranges else None,
            has_softmax_router=config.moe_router_score_function == "softmax",
            repeats_router=self._system.repeats_router,
        )
        self._history = LossHistory()
        self._stop: str | None = None
        self._chunks: list[Any] = []  # of the model on this rank, known from the first step on

    # The training step.

    def train_step(self, train_step: Callable[..., tuple], *args: Any, iteration: int, **kwargs: Any) -> tuple:
        """Take the place of Megatron's `train_step`; `iteration` counts the steps before it."""
        _, _, model, optimizer, scheduler, config, *_ = args
        number = iteration + 1
        watch = Watch() if number % self._args.health_interval == 0 else None
        rate = training.get_canonical_lr_for_logging(optimizer.param_groups) or 0.0
        with contextlib.ExitStack() as stack:
            if not self._chunks:
                self._know(unwrap_model(model))
            stack.callback(self._first.end)
            if watch is not None:
                self._watch(watch, model, config, stack)
            result = train_step(*args, iteration=iteration, **kwargs)
        loss_dict, _, _, should_exit, _, grad_norm, *_ = result
        if "lm loss" in loss_dict:
            self._history.add(number, loss_dict["lm loss"], grad_norm, rate)
        if watch is not None and not should_exit:
            is_warm = scheduler.num_steps > scheduler.lr_warmup_steps
            self._report(number, watch, optimizer.get_loss_scale().item(), is_warm)
        return result if self._stop is None else (*result[:4], 1, *result[5:])

    def _know(self, chunks: list[Any]) -> None:
        self._chunks = chunks
        self._owners = parameter_owners(chunks)
        self._first = FirstNonFinite(chunks, self._owners)
        trace_reruns(self._first)
        # Megatron does not compute the first step of a process again, whatever comes of it.
        self._first.begin()

    def _watch(self, watch: Watch, model: list[Any], config: Any, step: contextlib.ExitStack) -> None:
        """Watch the training step inside the block of `step`."""
        finalize = config.finalize_model_grads_func

        def finalize_and_record(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            record_gradients(watch, model, self._owners)

        for module in (module for chunk in self._chunks for module in chunk.modules()):
            if isinstance(module, TopKRouter):
                step.callback(watch_router(module))
        config.finalize_model_grads_func = finalize_and_record
        step.callback(setattr, config, "finalize_model_grads_func", finalize)
        self._first.begin()
        step.enter_context(watching(watch))
        self._record_parameters(watch)

    def _record_parameters(self, watch: Watch) -> None:
        """Record what is known of parameters alone, before the step changes them."""
        for chunk in self._chunks:
            groups = chunk.pg_collection
            stage = get_pg_size(groups.tp_dp_cp)
            of_experts = get_pg_size(groups.ep) / stage
            for module in chunk.modules():
                self._system.record_health(watch, module, of_experts)
            for name, module, halves in adapters(chunk):
                is_layer = hasattr(module, "layer_number")
                place = f"layer {module.layer_number}" if is_layer else chunk.decoder.place_of_loop(name.split(".")[-1])
                record_adapter(watch, place, halves, of_experts if ".experts." in f".{name}." else 1.0 / stage)

    # The report.

    def _report(self, number: int, watch: Watch, loss_scale: float, is_warm: bool) -> None:
        means, sums = watch.totals()
        cause = self._first.explain(here=False)
        found: list[Finding] = []
        bad_step: int | None = None
        if is_last_rank():
            spikes = self._history.settle()
            bad_step = self._history.first_non_finite()
            figures, loads = self._figures(means, sums, loss_scale), routing_loads(sums)
            # While the learning rate rises, figures say nothing yet.
            found = findings(figures, self._ranges, loads) if is_warm else []
            found += [Finding(spike, is_collapse=False) for spike in spikes]
            warnings = [finding.text for finding in found]
            if bad_step is not None or cause:
                warnings.append(_non_finite(bad_step or number, cause))
            self._write(Report(number, figures, loads, gradients_of_experts(sums, loss_scale), warnings))
        self._decide(found, bad_step, cause, number)

    def _figures(self, means: dict[Key, float], sums: dict[Key, Any], loss_scale: float) -> dict[Key, float]:
        concerns = (
            self._history.figures(),
            means.items(),
            recurrence_figures(means, sums),
            routing_figures(means, sums),
            gradient_figures(sums, loss_scale),
            depth_figures(),
        )
        return dict(itertools.chain.from_iterable(concerns))

    def _write(self, report: Report) -> None:
        for warning in report.warnings:
            print(f"WARNING: health at iteration {report.iteration}: {warning}", flush=True)
        if self._args.save is not None:
            folder = Path(self._args.save)
            folder.mkdir(parents=True, exist_ok=True)
            report.append_to(folder / HEALTH_FILE)
        if board := get_tensorboard_writer():
            report.write_to_tensorboard(board)
        if wandb := get_wandb_writer():
            report.write_to_wandb(wandb)

    # The end.

    def _decide(self, found: list[Finding], bad_step: int | None, cause: str, number: int) -> None:
        """End the run, or have it ended behind this step, on all ranks; the last rank knows."""
        stop = self._args.health_stop
        if stop == "none":
            return
        here = (bad_step or 0, any(finding.is_collapse for finding in found), bool(found))
        agreed = torch.tensor(list(map(int, here)), device="cuda")
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        step, collapsed, unhealthy = agreed.tolist()
        if step > 0 or cause:
            raise non_finite_stop(_non_finite(step or number, cause))
        if (stop == "any" and unhealthy) or (stop in ("collapse", "any") and collapsed):
            self._stop = f"--health-stop {stop} ends the run at iteration {number}"

    def checkpoint_and_decide_exit(self, decide: Callable[..., bool], *args: Any) -> bool:
        """Take the place of Megatron's function: save and leave where health says so."""
        if decide(*args):
            return True
        if self._stop is None:
            return False
        model, optimizer, scheduler, iteration, flops, context, data_iterator = args
        was_saved = self._args.save_interval and iteration % self._args.save_interval == 0
        if self._args.save and not was_saved:
            training.save_checkpoint_and_time(
                iteration, model, optimizer, scheduler, flops, context, train_data_iterator=data_iterator
            )
        training.print_datetime(self._stop)
        return True


def _non_finite(iteration: int, cause: str) -> str:
    return f"iteration {iteration}: loss or gradient norm is not finite{cause}"
