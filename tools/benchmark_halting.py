"""Benchmark halting on a copying task: how many steps positions take, by the coefficient of the ponder cost.

A small Universal Transformer learns to repeat the symbols before a separator. The dearer a step, the fewer are taken:
the mean number of steps falls in the order of the coefficients. Takes a minute or two without a GPU.

    python tools/benchmark_halting.py --ponder-coeffs 0 0.01 0.1
"""

import argparse
import json
from pathlib import Path
from typing import Any

from more_megatron.errors import OneLineParser, one_line_errors
from more_megatron.flags import check_ranges
from more_megatron.systems import systems
from more_megatron.unfinished import write_whole


def parse_flags() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ponder-coeffs", type=float, nargs="+", default=[0.0, 0.01, 0.1], metavar="C")
    parser.add_argument("--symbols", type=int, default=8, help="symbols to copy")
    parser.add_argument("--alphabet", type=int, default=16, help="kinds of symbols")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=8, help="most steps of a position")
    parser.add_argument("--train-iters", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--megatron-flags", default="", help="further flags of pretrain_more.py, in one string")
    return parser.parse_args()


def megatron_command_line(flags: argparse.Namespace, ponder_coeff: float) -> str:
    """Return the flags of a training run that describe the model."""
    system = next(name for name, system in systems().items() if "ponder_coeff" in system.own_flags())
    return f"""
        --more-variant {system} --recurrence-max-steps {flags.limit} --ponder-coeff {ponder_coeff}
        --num-layers 1 --hidden-size {flags.hidden_size} --num-attention-heads 4
        --ffn-hidden-size {2 * flags.hidden_size} --seq-length {2 * flags.symbols}
        --attention-dropout 0 --hidden-dropout 0 --seed {flags.seed}
        --micro-batch-size {flags.batch_size} --lr {flags.lr}
        --mock-data --tokenizer-type NullTokenizer --vocab-size {flags.alphabet + 1}
        --make-vocab-size-divisible-by 1 {flags.megatron_flags}
    """


def build(flags: argparse.Namespace, ponder_coeff: float) -> Any:
    """Return the model, with the same first weights whatever the coefficient."""
    from more_megatron.evaluation.runs import configure, fresh_model

    _, config = configure(megatron_command_line(flags, ponder_coeff))
    return fresh_model(config, flags.seed)


def copying_batch(flags: argparse.Namespace, generator: Any) -> tuple[Any, Any]:
    """Return symbols, a separator and the symbols again, [b, 2 n + 1]; and where the copy is predicted, [b, 2 n]."""
    import torch

    symbols = torch.randint(flags.alphabet, (flags.batch_size, flags.symbols), generator=generator)
    separator = torch.full((flags.batch_size, 1), flags.alphabet)
    counts = torch.zeros(flags.batch_size, 2 * flags.symbols)
    counts[:, flags.symbols :] = 1.0
    return torch.cat((symbols, separator, symbols), dim=1), counts


def train(flags: argparse.Namespace, ponder_coeff: float) -> dict[str, float]:
    """Train once and return how many steps positions took at first and in the end, and how well they copy."""
    import torch

    from more_megatron.evaluation.step_benchmark import forward
    from more_megatron.model.depth import Depth
    from more_megatron.model.halting import HALTING_FIGURES
    from more_megatron.monitoring.figures import Figures, report_to

    model = build(flags, ponder_coeff)
    optimizer = torch.optim.Adam(model.parameters(), lr=flags.lr)
    generator = torch.Generator().manual_seed(flags.seed)
    depth, samples = Depth(0, flags.limit), tuple(range(flags.batch_size))
    figures, steps, losses = Figures(HALTING_FIGURES), [], []
    report_to(figures)
    for _ in range(flags.train_iters):
        tokens, counts = (part.cuda(torch.cuda.current_device()) for part in copying_batch(flags, generator))
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = (forward(model, inputs, labels, depth, samples) * counts).sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(figures.means()[HALTING_FIGURES[0]])
        figures.clear()
        losses.append(loss.item())
    last = max(len(steps) // 20, 1)
    return {
        "ponder_coeff": ponder_coeff,
        "steps_at_first": steps[0],
        "steps_in_the_end": sum(steps[-last:]) / last,
        "loss_in_the_end": sum(losses[-last:]) / last,
    }


def main() -> None:
    """Run the benchmark."""
    flags = parse_flags()
    with one_line_errors("benchmark_halting.py"):
        numbers = ("symbols", "alphabet", "hidden_size", "limit", "train_iters", "batch_size")
        if flags.json:
            flags.json.parent.mkdir(parents=True, exist_ok=True)
        check_ranges(flags, dict.fromkeys(numbers, "[1, inf)") | {"lr": "[0, inf)"})
        rows = []
        for number, ponder_coeff in enumerate(flags.ponder_coeffs):
            row = train(flags, ponder_coeff)
            if number == 0:
                print("".join(f"{name.replace('_', ' '):>18}" for name in row))
            rows.append(row)
            print("".join(f"{value:18.4g}" for value in row.values()), flush=True)
        if flags.json:
            write_whole(flags.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
