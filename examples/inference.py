#!/usr/bin/env python
"""What recurrence gives at inference, one ability after the other, with a model that convert_checkpoint.py exported.

    python examples/inference.py exported --prompt "The history of"

docs/inference.md says what each does, costs and saves.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Run them on one prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported model")
    parser.add_argument("--prompt", default="The history of", help="a text to continue")
    parser.add_argument("--new-tokens", type=int, default=20, help="tokens to generate")
    parser.add_argument("--num-steps", type=int, help="steps at full depth (default: the model's)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    prompt = tokenizer(args.prompt, return_tensors="pt")
    steps = args.num_steps or model.config.mean_recurrence

    def generate(**options: Any) -> Any:
        settings = {"max_new_tokens": args.new_tokens, "do_sample": False, "return_dict_in_generate": True}
        return model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            num_steps=steps,
            **settings,
            **options,
        )

    def attempt(title: str, options: dict[str, Any], report: Any) -> None:
        """Generate with an ability and print what came of it; a system that lacks it says so."""
        print(f"\n{title}: generate({', '.join(f'{name}={value!r}' for name, value in options.items())})")
        try:
            output = generate(**options)
        except ValueError as error:
            print(f"  {error}")
            return
        print(f"  {tokenizer.decode(output.sequences[0])!r}")
        report(output)

    def steps_of_tokens(output: Any) -> None:
        mean = output.exit_steps[:, 0].float().mean(0)
        print("  steps of each token:", " ".join(f"{value:.1f}" for value in mean.tolist()))

    def cached_bytes(output: Any) -> None:
        cache = output.get("cache", output.get("past_key_values"))
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        print(f"  {sum(part.numel() * part.element_size() for part in parts):,} bytes of keys and values")

    def acceptance(output: Any) -> None:
        shares = f"{int(output.accepted)} of {int(output.drafted)} drafted tokens"
        print(f"  {shares} accepted in {output.verifications} verifications")

    attempt(f"Full depth, {steps} steps", {}, cached_bytes)
    attempt("Adaptive exit", {"criterion": "latent-diff", "exit_threshold": 0.1}, steps_of_tokens)
    attempt("A cache of one step", {"cache_steps": 1}, cached_bytes)
    attempt("Warm start", {"warm_start": True}, lambda output: None)
    attempt("Self-speculation", {"draft_steps": max(steps // 4, 1), "lookahead_for_draft": 4}, acceptance)

    print("\nThe states of one call: model(..., output_recurrent_states=True, output_router_logits=True)")
    with torch.no_grad():
        output = model(**prompt, num_steps=steps, output_recurrent_states=True, output_router_logits=True)
    if output.recurrent_states is not None:
        states = output.recurrent_states.float()  # [recurrences, steps, b, s, h]
        change = (states[:, 1:] - states[:, :-1]).norm(dim=-1) / states[:, 1:].norm(dim=-1)
        for index, row in enumerate(change.mean(dim=(-1, -2)).tolist()):
            print(
                f"  recurrence {index}, relative change from step to step:", " ".join(f"{value:.3f}" for value in row)
            )
    for layer, logits in (output.router_logits.by_layer() if output.router_logits else {}).items():
        chosen = logits.argmax(-1)  # [steps, b, s]
        same = (chosen[1:] == chosen[:-1]).float().mean().item() if len(chosen) > 1 else 1.0
        print(f"  layer {layer}: {same:.0%} of the tokens keep their first expert from step to step")


if __name__ == "__main__":
    main()
