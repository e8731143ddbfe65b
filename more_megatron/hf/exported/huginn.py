"""`huginn`: prelude, a core with input injection repeated from a random state, coda (Geiping et al., arXiv 2502.05171).

a <- N2(x + Attn(N1(x))),   out <- N4(a + MLP(N3(a)))   in each layer; one norm behind the core and behind the coda.
"""

from __future__ import annotations

from torch import Tensor

from .context import CallContext
from .fields import Config
from .interface import DividedSystem
from .layer import SandwichLayer
from .stack import InjectedLoop, division_fields


class Core(InjectedLoop):
    """Repeats the core on a random state, or on its input where nothing is injected."""

    adds_at_first = True

    def first_state(self, hidden_states: Tensor, context: CallContext) -> Tensor:
        if self.config.injection == "none":
            return hidden_states
        # The training code numbers the groups of its stack from 1; the prelude is one.
        return context.initial_state(0, hidden_states, layer=2 if self.config.prelude_layers > 0 else 1)


class Huginn(DividedSystem):
    """Sandwich layers and one initial state."""

    layer_class = SandwichLayer
    loop_class = Core
    scales_embeddings = True
    norms_coda_input = True
    fields = division_fields("linear")

    def num_states(self, config: Config) -> int:
        return 0 if config.injection == "none" else 1


SYSTEM = Huginn()
