"""Configuration of MoRE (Mixture of Recurrent Experts) models for Hugging Face transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .fields import complete_fields
from .system import find_system, system_names, write_code

# What users of other models set, and no code here reads.
_WITHOUT_EFFECT = {
    **dict.fromkeys(("rope_parameters", "rope_scaling"), "rope_theta and rope_scaling_factor rotate positions"),
    "attention_dropout": "attention has no dropout",
    "sliding_window": "attention has no window",
}


class MoREConfig(PretrainedConfig):
    """What a MoRE model is made of, and how its recurrence runs.

    Args:
        variant: Name of the system. Default: the first of this folder, which in an export is that of the model.
        fields: The fields of `FIELDS` in `fields.py`, those of the system, and those of every model in transformers.

    Raises:
        ValueError: If there is no such system, or a field has a wrong type or value, or fields contradict each other.
    """

    model_type = "more"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "past_key_values",
        "cache",
        "hidden_states",
        "router_logits",
        "aux_loss",
        "recurrent_states",
        "exit_steps",
    ]

    def __init__(self, variant: str | None = None, **fields: Any) -> None:
        variant = system_names()[0] if variant is None else variant
        system = find_system(variant)
        self.variant = variant
        known = system.all_fields
        values = complete_fields(known, {**system.defaults, **fields})
        for name, value in values.items():
            setattr(self, name, value)
        others = {name: value for name, value in fields.items() if name not in known}
        others["tie_word_embeddings"] = values["tie_word_embeddings"]
        super().__init__(**others)
        self.check()

    def check(self) -> None:
        """Check the fields as they are now.

        Raises:
            ValueError: As above, or if something is set that has no effect.
        """
        system = find_system(self.variant)
        system.check_config({name: getattr(self, name) for name in system.all_fields})
        for name, reason in _WITHOUT_EFFECT.items():
            if getattr(self, name, None):
                raise ValueError(f"{name} {getattr(self, name)!r} has no effect: {reason}")

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all fields: what `config.json` does not say would follow from the defaults of whoever reads it."""
        return self.to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and the code of the model if it is to be loaded without this package."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self._auto_class is not None:
            write_code(Path(save_directory), self.variant)


MoREConfig.register_for_auto_class()
