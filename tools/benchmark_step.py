"""Benchmark training steps of the systems at equal operations a token, on the machine at hand.

Prints for each system tokens/s, achieved FLOP/s, peak memory and the ratio of its achieved FLOP/s to that of `moe` in
the same round, then the time of a step against the number of recurrence steps.

    python tools/benchmark_step.py --hidden-size 256 --num-experts 8 --seq-length 256
    python tools/benchmark_step.py --dense --same-layers --num-layers 4 --systems moe loop huginn
"""

import argparse
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

from more_megatron.errors import OneLineParser, one_line_errors
from more_megatron.flags import check_ranges
from more_megatron.systems import get_system, names
from more_megatron.unfinished import write_whole


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(names()), metavar="NAME", help="default: all")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--dense", action="store_true", help="no experts; the baseline `moe` is Megatron's dense model")
    parser.add_argument("--same-layers", action="store_true", help="layers of the same width, not of equal operations")
    parser.add_argument("--topk", type=int, default=1, help="experts a token")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--recurrence-steps", type=int, default=4, help="steps r of the comparison")
    parser.add_argument("--backprop-steps", type=int, default=None, help="of these with gradient; default: all")
    parser.add_argument(
        "--depths",
        type=written_depth,
        nargs="*",
        default=["1", "2", "4", "8"],
        metavar="DEPTH",
        help="for step time against depth: r, or n+b for n steps without gradient and b with it",
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each system")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--megatron-flags", default="", help="further flags of pretrain_more.py, in one string")
    return parser.parse_args()


def written_depth(text: str) -> str:
    """Return a value of `--depths`, once it is known to be one."""
    if re.fullmatch(r"(\d+\+)?[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps r from 1 nor n+b, such as 2+2")
    return text


def megatron_command_line(flags: argparse.Namespace, system: str) -> str:
    """Return the flags of a training run that describe the model."""
    steps = f"--recurrence-steps {flags.recurrence_steps}" if get_system(system).recurrent else ""
    return f"""
        --more-variant {system} {steps} --num-layers {flags.num_layers} --hidden-size {flags.hidden_size}
        --num-attention-heads {flags.num_attention_heads} --seq-length {flags.seq_length}
        --micro-batch-size {flags.batch_size} --num-experts {flags.num_experts} --moe-router-topk {flags.topk}
        --moe-aux-loss-coeff 0.001 --moe-shared-expert-intermediate-size {2 * flags.hidden_size}
        --attention-dropout 0 --hidden-dropout 0
        --mock-data --tokenizer-type NullTokenizer --vocab-size {flags.vocab_size - 1} --lr 1e-3
        {flags.megatron_flags}
    """


def build(flags: argparse.Namespace) -> dict:
    """Return a benchmark for each system; their experts are as wide as equal cost allows."""
    from more_megatron.evaluation.matching import Described
    from more_megatron.evaluation.step_benchmark import StepBenchmark
    from more_megatron.model.depth import Depth
    from more_megatron.training.model import model_config_from_args

    grad_steps = min(flags.backprop_steps or flags.recurrence_steps, flags.recurrence_steps)
    depth = Depth(flags.recurrence_steps - grad_steps, grad_steps)
    models = {}
    for system in flags.systems:
        model = Described.by(megatron_command_line(flags, system), depth)
        if flags.dense:
            args = model.args
            args.num_experts = args.moe_ffn_hidden_size = args.moe_shared_expert_intermediate_size = None
            model = replace(model, config=model_config_from_args(args))
        models[system] = model
    target = max(model.flops for model in models.values())
    if not flags.same_layers:
        models = {system: model.match(flops=target) for system, model in models.items()}
    return {system: StepBenchmark(model, flags.batch_size) for system, model in models.items()}


def compare(flags: argparse.Namespace, benchmarks: dict) -> list[dict]:
    """Time the systems, print the table and return its rows."""
    from more_megatron.evaluation.step_benchmark import time_systems

    timings = time_systems(benchmarks, flags.rounds, flags.warmup)
    baseline = next((timing for timing in timings if timing.name == "moe"), None)
    heads = ("M params", "MFLOP/tok", "tokens/s", "GFLOP/s", "peak MB", "vs moe")
    print(f"{'system':18} " + " ".join(f"{head:>10}" for head in heads))
    rows = []
    for timing in timings:
        row = {
            "system": timing.name,
            "parameters": timing.model.parameters,
            "flops_per_token": timing.model.flops,
            "tokens_per_second": timing.tokens_per_second,
            "achieved_flops": timing.achieved_flops,
            "peak_bytes": timing.peak_bytes,
            "ratio_to_moe": timing.ratio_to(baseline) if baseline else float("nan"),
        }
        rows.append(row)
        print(
            f"{row['system']:18} {row['parameters'] / 1e6:10.2f} {row['flops_per_token'] / 1e6:10.2f} "
            f"{row['tokens_per_second']:10.0f} {row['achieved_flops'] / 1e9:10.2f} "
            f"{row['peak_bytes'] / 2**20:10.0f} {row['ratio_to_moe']:10.2f}",
            flush=True,
        )
    return rows


def against_depth(flags: argparse.Namespace, benchmarks: dict) -> list[dict]:
    """Time steps of different depth, print the table and return its rows."""
    depths = {written: depth_of(written) for written in flags.depths}
    has_line = len({depth.grad_steps for depth in depths.values() if not depth.no_grad_steps}) > 1
    heads = " ".join(f"{written:>8}" for written in depths)
    print(f"\nmilliseconds a step against r (n+b), and by how much it is off n + 3b passes\n{'system':18} {heads}")
    rows, rounds = [], max(flags.rounds // 2, 1)
    for system, benchmark in benchmarks.items():
        if not get_system(system).recurrent:
            continue
        # The first round warms up.
        times = [{written: benchmark.step(depth) for written, depth in depths.items()} for _ in range(rounds + 1)][1:]
        seconds = {written: statistics.median(each[written] for each in times) for written in depths}
        row = {"system": system, "seconds": seconds}
        print(f"{system:18} " + " ".join(f"{1e3 * time:8.1f}" for time in seconds.values()), flush=True)
        if has_line:
            row["off_the_line"] = off_the_line(depths, seconds)
            print(f"{'':18} " + " ".join(f"{part:+8.1%}" for part in row["off_the_line"].values()), flush=True)
        rows.append(row)
    return rows


def off_the_line(depths: dict, seconds: dict[str, float]) -> dict[str, float]:
    """Return by how much each step takes longer than its passes say, as a part of that; below 0 where it is faster.

    A pass with gradient counts three times one without, and what is not repeated adds a constant. The line goes through
    the shortest and the longest step all of whose passes have a gradient.
    """
    passes = {written: depth.no_grad_steps + 3 * depth.grad_steps for written, depth in depths.items()}
    ends = [written for written, depth in depths.items() if not depth.no_grad_steps]
    first, last = min(ends, key=passes.__getitem__), max(ends, key=passes.__getitem__)
    slope = (seconds[last] - seconds[first]) / (passes[last] - passes[first])
    line = {written: seconds[first] + slope * (passes[written] - passes[first]) for written in passes}
    return {written: time / line[written] - 1 for written, time in seconds.items()}


def depth_of(written: str):
    """Return the depth that `r` or `n+b` means."""
    from more_megatron.model.depth import Depth

    free, _, with_gradient = written.rpartition("+")
    return Depth(int(free or 0), int(with_gradient))


def main() -> None:
    """Run the benchmark."""
    flags = parse_flags()
    with one_line_errors("benchmark_step.py"):
        if flags.json:
            flags.json.parent.mkdir(parents=True, exist_ok=True)
        check_ranges(flags, {"rounds": "[1, inf)", "warmup": "[0, inf)", "backprop_steps": "[1, inf)"})
        benchmarks = build(flags)
        figures = {"comparison": compare(flags, benchmarks)}
        if flags.depths:
            figures["by_depth"] = against_depth(flags, benchmarks)
        if flags.json:
            write_whole(flags.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
