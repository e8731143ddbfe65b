#!/usr/bin/env python
"""What a recurrent model gives at inference, and what it saves: adaptive exit, smaller caches, self-speculation.

Loss is measured on windows of a text, times on generation from their beginnings.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.flags import check_ranges

_PROMPT = 16


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and return the exit code."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("model", type=Path, help="an exported model")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--num-steps", type=int, help="steps at full depth (default: the model's)")
    parser.add_argument("--windows", type=int, default=32, help="windows of the text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens of a draft")
    parser.set_defaults(load=None, dtype=None, device=None, trust_remote_code=False)
    args = parser.parse_args(arguments)
    import torch

    with one_line_errors(Path(__file__).name), torch.no_grad():
        numbers = dict.fromkeys(("num_steps", "windows", "batch_size", "draft_tokens"), "[1, inf)")
        check_ranges(args, numbers | {"length": f"[{_PROMPT + 1}, inf)", "new_tokens": "[2, inf)"})
        with open_model(args) as exported:
            bench = _Benchmark(args, exported)
        for title, header, rows in (
            ("Steps", "steps | loss | tokens/s", bench.depths),
            (
                "Adaptive exit",
                "criterion | threshold | mean steps | loss | mean steps, generating | tokens/s",
                bench.exits,
            ),
            ("Cache", "cache_steps | bytes a token, recurrent part | other | loss behind the prompt", bench.caches),
            ("Warm start", "steps | loss behind the prompt | with a warm start", bench.warm_starts),
            ("Self-speculation", "draft_steps | accepted | tokens a verification | tokens/s", bench.drafts),
        ):
            if title in bench.absent:
                print(f"\n## {title}\n\nThis system has none.", flush=True)
            else:
                _table(title, header, rows())
    return 0


def _table(title: str, header: str, rows: Iterator[tuple]) -> None:
    columns = header.count("|") + 1
    print(f"\n## {title}\n\n| {header} |\n|{'---|' * columns}", flush=True)
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |",
            flush=True,
        )


class _Benchmark:
    """A model, windows of a text, and what is measured of them."""

    def __init__(self, args: argparse.Namespace, exported: ExportedModel) -> None:
        import torch

        if not exported.recurrent:
            raise MoREError(f"{args.model} has no recurrence, which all of this is about: name another model")
        self.args, self.torch, self.model = args, torch, exported.model
        ids = exported.tokenizer(args.text.read_text(), return_tensors="pt").input_ids[0]
        wanted = args.windows * args.length
        if len(ids) < wanted:
            raise MoREError(f"{args.text} has {len(ids)} tokens, not {wanted}: give a longer text or fewer --windows")
        self.windows = ids[:wanted].view(args.windows, args.length).to(self.model.device)
        config, system = self.model.config, self.model.system
        self.steps = args.num_steps or config.mean_recurrence
        has = {"Cache": system.caches_steps(config), "Warm start": system.num_states(config) > 0}
        self.absent = {title for title, there in has.items() if not there}

    def depths(self) -> Iterator[tuple]:
        """Yield steps, loss and speed without any of the abilities."""
        for steps in sorted({1, *(self.steps // part for part in (8, 4, 2, 1) if self.steps // part > 0)}):
            loss, _ = self._loss(num_steps=steps)
            yield steps, loss, self._generate(num_steps=steps)[1]

    def exits(self) -> Iterator[tuple]:
        """Yield criteria and thresholds with the steps they lead to, the loss, and the speed of generation."""
        for criterion, thresholds in {
            "latent-diff": (0.03, 0.1, 0.3),
            "cosine": (1e-3, 1e-2, 5e-2),
            "kl": (1e-3, 1e-2, 1e-1),
            "entropy-diff": (1e-3, 1e-2, 1e-1),
            "argmax-stability": (3, 2, 1),
        }.items():
            for threshold in thresholds:
                kwargs = {"criterion": criterion, "exit_threshold": threshold, "num_steps": self.steps}
                loss, steps = self._loss(**kwargs)
                output, speed = self._generate(**kwargs)
                generating = output.exit_steps[:, :, _PROMPT:].double().mean().item()
                yield criterion, threshold, steps, loss, generating, speed

    def caches(self) -> Iterator[tuple]:
        """Yield steps in the cache, its size, and the loss of tokens that read it one by one."""
        from more_megatron.hf.exported.cache import cache_sizes

        for kept in sorted({1, self.steps // 4, self.steps // 2, self.steps} - {0}):
            loss, cache = self._decode(num_steps=self.steps, cache_steps=kept)
            parts = cache_sizes(cache)
            found = {part: size / cache.get_seq_length() / self.args.batch_size for part, size in parts.items()}
            yield kept, found["recurrent"], found["other"], loss

    def warm_starts(self) -> Iterator[tuple]:
        """Yield the loss of tokens one by one, begun with noise and where the token before ended."""
        for steps in sorted({1, self.steps // 4, self.steps // 2, self.steps} - {0}):
            yield steps, *(self._decode(num_steps=steps, warm_start=warm)[0] for warm in (False, True))

    def drafts(self) -> Iterator[tuple]:
        """Yield steps of drafts, the share that is accepted, and the speed."""
        yield "none", "", "", self._generate(num_steps=self.steps)[1]
        for steps in sorted({1, self.steps // 4, self.steps // 2} - {0, self.steps}):
            kwargs = {"draft_steps": steps, "lookahead_for_draft": self.args.draft_tokens}
            output, speed = self._generate(num_steps=self.steps, **kwargs)
            accepted = (output.accepted.sum() / output.drafted.sum()).item()
            rounds = output.drafted.sum().item() / self.args.draft_tokens
            yield steps, accepted, output.accepted.sum().item() / rounds + 1.0, speed

    def _loss(self, **kwargs: Any) -> tuple[float, float]:
        """Return the mean loss of a token in nats, and the mean steps that it took in a recurrence."""
        losses, steps = [], []
        for ids in self.windows.split(self.args.batch_size):
            output = self.model(ids, labels=ids, use_cache=False, **kwargs)
            losses.append(output.loss.item())
            if output.get("exit_steps") is not None:
                steps.append(output.exit_steps.double().mean().item())
        return sum(losses) / len(losses), sum(steps) / len(steps) if steps else math.nan

    def _decode(self, **kwargs: Any) -> tuple[float, Any]:
        """Return the loss of tokens behind a prompt that are given one by one, and the cache."""
        ids = self.windows[: self.args.batch_size]
        output = self.model(ids[:, :_PROMPT], **kwargs)
        logits = [output.logits[:, -1]]
        for place in range(_PROMPT, ids.size(1) - 1):
            output = self.model(ids[:, place : place + 1], past_key_values=output.past_key_values, **kwargs)
            logits.append(output.logits[:, -1])
        scores = self.torch.stack(logits, dim=1).flatten(0, 1)
        loss = self.torch.nn.functional.cross_entropy(scores, ids[:, _PROMPT:].flatten()).item()
        return loss, output.past_key_values

    def _generate(self, **kwargs: Any) -> tuple[Any, float]:
        """Return what is generated greedily, and new tokens a second, the better of two runs."""
        ids = self.windows[: self.args.batch_size, :_PROMPT]
        count = self.args.new_tokens

        def run() -> Any:
            return self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                eos_token_id=self.model.config.vocab_size,
                pad_token_id=0,
                do_sample=False,
                return_dict_in_generate=True,
                **kwargs,
            )

        output, seconds = min((_timed(run) for _ in range(2)), key=lambda found: found[1])
        return output, ids.size(0) * count / seconds


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
