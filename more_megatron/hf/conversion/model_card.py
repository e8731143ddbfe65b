"""The README of an export."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from more_megatron.flags import flag
from more_megatron.systems import get_system

_LOSSES = {"lm loss": "training loss", "lm loss validation": "validation loss"}
_TRAINING = (
    *("seq_length", "global_batch_size", "micro_batch_size", "train_iters", "train_samples"),
    *("optimizer", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters"),
    *("adam_beta1", "adam_beta2", "weight_decay", "clip_grad", "attention_dropout", "hidden_dropout"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_expert_capacity_factor"),
    *("bf16", "fp16", "seed"),
)


def model_card(
    config: Mapping[str, Any],
    args: argparse.Namespace,
    iteration: int,
    parameters: int,
    has_tokenizer: bool,
    note: str | None = None,
) -> str:
    """Return the text.

    Args:
        config: Content of `config.json`.
        args: Arguments from the checkpoint.
        iteration: At which that was saved.
        parameters: Number of parameters.
        has_tokenizer: Whether there are files of a tokenizer.
        note: What is to be known of the form, if it is not ours.
    """
    system = get_system(config["variant"])
    sizes = {
        "parameters": f"{parameters:,}",
        "layers": f"{config['num_hidden_layers']}, of which {sum(config['moe_layers'])} with experts",
        "hidden size": config["hidden_size"],
        "attention": f"{config['num_attention_heads']} heads of {config['head_dim']}, "
        f"{config['num_key_value_heads']} of keys and values",
    }
    if any(config["moe_layers"]):
        sizes["experts"] = f"{config['num_experts']}, {config['num_experts_per_tok']} for each token"
        sizes["shared expert"] = config["shared_expert_intermediate_size"] or "none"
    sizes |= {"vocabulary, with padding": config["vocab_size"], "dtype": config["dtype"]}
    if system.recurrent:
        sizes["recurrence steps in evaluation"] = config["mean_recurrence"]
    samples = getattr(args, "consumed_train_samples", None)
    state: dict[str, Any] = {"iteration": iteration}
    if samples:
        state |= {"sequences seen": f"{samples:,}", "tokens seen": f"{samples * args.seq_length:,}"}
    state |= _losses(getattr(args, "tensorboard_dir", None), iteration)
    names = (*_TRAINING, *sorted(system.reads), *system.own_flags())
    training = {f"`{flag(key)}`": getattr(args, key, None) for key in names}
    shown = {key: value for key, value in training.items() if value not in (None, False)}
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [more, moe, recurrent-depth]\n---\n",
            f"# MoRE `{system.name}`: {system.summary}\n",
            "Trained with MoRE (Mixture of Recurrent Experts) on Megatron, converted from a `torch_dist` checkpoint.\n",
            *_section("Model", sizes),
            *_section("Training", state),
            *_section("Flags of the run", shown),
            *([] if note is None else [f"{note}\n"]),
            _usage(system.recurrent, has_tokenizer),
        ]
    )


def _section(title: str, rows: Mapping[str, Any]) -> list[str]:
    return [f"## {title}\n", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _usage(is_recurrent: bool, has_tokenizer: bool) -> str:
    depth = ", num_steps=8" if is_recurrent else ""
    lines = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    lines.append("model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)")
    if has_tokenizer:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50{depth})[0]))",
        ]
    return "\n".join(["## Use\n", "```python", *lines, "```", ""])


def _losses(folder: str | None, iteration: int) -> dict[str, str]:
    """Return the last losses up to an iteration from the TensorBoard files of the run, if they are here.

    Runs used to write the loss on the test split under the same tag and iteration as the last on the validation split,
    after it.
    """
    if folder is None or not any(Path(folder).glob("**/events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(folder)
    accumulator.Reload()
    found = {}
    for tag, name in _LOSSES.items():
        events = accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else []
        earlier = [event for event in events if event.step <= iteration]
        if earlier:
            last = max(earlier, key=lambda event: event.step)  # the first of several
            found[name] = f"{last.value:.4f} nats a token (iteration {last.step})"
    return found
