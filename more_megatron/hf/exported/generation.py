"""Generation: what `generate` does beside what transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .options import CallOptions

__all__ = ["MoREGenerationMixin"]


class MoREGenerationMixin(GenerationMixin):
    """Generation with the options of calls."""

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, with what every model of transformers takes and the options of `CallOptions`.

        With a criterion, and where an object is returned, that has `exit_steps`: the steps that each token took,
        [recurrences, b, tokens], 0 for padding. The last token was not given to the model. Not with beams.
        """
        steps: list[Tensor] | None = None
        if kwargs.get("criterion", kwargs.get("exit_criterion")) is not None:
            steps = kwargs["exit_log"] = []
        output = super().generate(*args, **kwargs)
        if steps and not isinstance(output, Tensor):
            found = torch.cat(steps, dim=-1) if len({part.shape[:2] for part in steps}) == 1 else steps[0]
            if found.shape[1:] == output.sequences[:, 1:].shape and getattr(output, "beam_indices", None) is None:
                output["exit_steps"] = found
        return output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, exit_log: list[Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next call: of the initial states those of its tokens."""
        states = kwargs.pop("input_states", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if states is not None:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            cache = inputs.get("past_key_values", inputs.get("cache"))
            past = 0 if cache is None else cache.get_seq_length()
            states = states[:, :, past : past + tokens.size(1)]
            inputs["input_states"] = states if states.size(2) > 0 else None
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Note the steps that the tokens of a call took."""
        if model_kwargs.get("exit_log") is not None and outputs.get("exit_steps") is not None:
            model_kwargs["exit_log"].append(outputs["exit_steps"])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        """Look for misspelled arguments; the options are none of them."""
        known = CallOptions.names()
        GenerationMixin._validate_model_kwargs(
            self, {name: value for name, value in model_kwargs.items() if name not in known}
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:  # type: ignore[override]
        """Repeat each sequence, for beams and samples; in initial states sequences are the second dimension."""
        states = kwargs.pop("input_states", None)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, found = expand(expand_size=expand_size, **kwargs)
        if states is not None:
            found["input_states"] = states.repeat_interleave(expand_size, dim=1)
        return input_ids, found
