"""Generation: what `generate` does beside what transformers does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .options import OPTIONS, WITHOUT_STEPS, CallOptions, positive
from .speculation import DRAFT_TOKENS, speculate

_DRAFT_OPTIONS = ("draft_steps", "lookahead_for_draft", "draft_tokens")


class MoREGenerationMixin(GenerationMixin):
    """Generation with the options of calls."""

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate, with what every model of transformers takes and the options of `CallOptions`.

        Options may stand in the generation configuration, too. With a criterion, and where an object is returned, that
        has `exit_steps`: the steps that each token took, [recurrences, b, tokens], 0 for padding. The last token was
        not given to the model. Not with beams.

        Args:
            inputs, generation_config, args: As in transformers.
            kwargs: As in transformers, the options, and for self-speculation:
                draft_steps: Steps that drafts are made with, fewer than `num_steps`, which verify them.
                lookahead_for_draft: Tokens of a draft, `draft_tokens` is the same. Default: 4.

        Returns:
            What transformers returns; where tokens were drafted and an object is wanted, a `SpeculativeOutput`.

        Raises:
            ValueError: If options have no effect, contradict each other or are out of range.
        """
        settings: Any = self.generation_config if generation_config is None else generation_config
        stored = {name: value for name, value in vars(settings).items() if name in (*OPTIONS, *_DRAFT_OPTIONS)}
        args, kwargs = (inputs, generation_config, *args), {**stored, **kwargs}
        draft = self._draft_options(kwargs, settings)
        if draft is not None:
            return super().generate(*args, custom_generate=partial(speculate, **draft), **kwargs)
        steps: list[Tensor] = []
        if kwargs.get("criterion", kwargs.get("exit_criterion")) is not None:
            kwargs["exit_log"] = steps  # Overwrites what an assistant is given of the model it assists.
        output = super().generate(*args, **kwargs)
        is_whole = len({part.shape[:2] for part in steps}) == 1 and getattr(output, "beam_indices", None) is None
        if is_whole and not isinstance(output, Tensor):
            found = torch.cat(steps, dim=-1)
            if found.shape[1:] == output.sequences[:, 1:].shape:
                output["exit_steps"] = found
        return output

    def _draft_options(self: Any, kwargs: dict[str, Any], settings: GenerationConfig) -> dict[str, Any] | None:
        """Return steps and tokens of drafts, which are taken from the arguments; None if there are to be none."""
        steps, *counts = (kwargs.pop(name, None) for name in _DRAFT_OPTIONS)
        tokens = next((value for value in counts if value is not None), None)
        if steps is None:
            if tokens is not None:
                raise ValueError(f"lookahead_for_draft {tokens!r} has no effect without draft_steps")
            return None
        options = CallOptions.taken_from(dict(kwargs), self.config)
        others = {name: getattr(options, name) for name in ("criterion", "cache_steps", "warm_start")}
        others |= {name: kwargs.get(name) for name in ("assistant_model", "streamer")}
        others["num_beams"] = kwargs.get("num_beams", settings.num_beams) not in (None, 1)
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"draft_steps does not go together with {name}: leave one of them out")
        if not self.system.recurrent:
            raise ValueError(f"draft_steps has no effect: {WITHOUT_STEPS}")
        steps = positive("draft_steps", steps)
        if steps >= options.num_steps:
            raise ValueError(f"draft_steps {steps} must be below num_steps {options.num_steps}")
        tokens = positive("lookahead_for_draft", DRAFT_TOKENS if tokens is None else tokens)
        return {"draft_steps": steps, "draft_tokens": tokens}

    def _prepare_generation_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the options out again: transformers puts arguments there where these are stored, and calls read none."""
        prepared, others = GenerationMixin._prepare_generation_config(self, *args, **kwargs)
        for name in OPTIONS & vars(prepared).keys():
            others[name] = vars(prepared).pop(name)
        return prepared, others

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        exit_log: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next call: of the initial states those of its tokens.

        transformers looks for `inputs_embeds` among the names here, before it takes them.
        """
        states = kwargs.pop("input_states", None)
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
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
        others = {name: value for name, value in model_kwargs.items() if name not in OPTIONS}
        GenerationMixin._validate_model_kwargs(self, others)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:  # type: ignore[override]
        """Repeat each sequence, for beams and samples; in initial states sequences are the second dimension."""
        states = kwargs.pop("input_states", None)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, found = expand(expand_size=expand_size, **kwargs)
        if states is not None:
            found["input_states"] = states.repeat_interleave(expand_size, dim=1)
        return input_ids, found
