"""Routing at its extremes: all tokens at one expert, so that another rank's experts receive none."""

import itertools
import os

import pytest
import torch
from megatron.core import tensor_parallel

from more_megatron.blocks.dispatch import DISPATCHERS
from more_megatron.blocks.layer import LayerInputs
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.systems import systems
from more_megatron.systems.export import FEED_FORWARD
from tests.helpers.models import EXPERTS, HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 8, 2
_OWN_EXPERTS = [name for name, system in systems().items() if system.expert_rows is not FEED_FORWARD]


# The output, the size of the experts' gradients, and how many gradients of the layer are missing.
Outcome = tuple[torch.Tensor, float, int]


def _all_to_one_expert(variant: str, dispatcher: str, expert: int) -> Outcome:
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    ranks = torch.distributed.get_world_size()
    config = small_config(variant, expert_model_parallel_size=ranks, moe_token_dispatcher_type=dispatcher)
    model = gpt_model(config, _LENGTH).train()
    moe = model.decoder.layers[0].mlp
    probs = torch.zeros(_LENGTH * _BATCH, EXPERTS)
    probs[:, expert] = 0.5
    moe.route = lambda *_: (probs, probs != 0)
    hidden = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = LayerInputs(MicroBatch(Depth(1, 2), (0, 1)), rotary_pos_emb=model.rotary_pos_emb(_LENGTH))
    output, _ = moe(hidden, inputs)
    output.square().sum().backward()
    assert torch.isfinite(hidden.grad).all()
    gradients = {name: p.grad for name, p in moe.named_parameters() if not name.startswith("router")}
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert all(torch.isfinite(gradient).all() for gradient in present.values())
    size = sum(float(gradient.abs().sum()) for name, gradient in present.items() if name.startswith("experts"))
    return output.detach(), size, len(gradients) - len(present)


def _outcomes() -> dict[tuple[str, str, int], Outcome]:
    start_ranks(expert=int(os.environ["WORLD_SIZE"]))
    cases = itertools.product(_OWN_EXPERTS, DISPATCHERS, (0, EXPERTS - 1))
    return {case: _all_to_one_expert(*case) for case in cases}


@pytest.fixture(scope="module")
def outcomes() -> tuple[dict, dict, dict]:
    """Return what a single process computes, and what each of two ranks does."""
    return (*run_ranks(1, _outcomes), *run_ranks(2, _outcomes))


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
def test_a_rank_without_rows_takes_part(outcomes: tuple[dict, dict, dict], variant: str) -> None:
    whole, *ranks = outcomes
    for case in itertools.product([variant], DISPATCHERS, (0, EXPERTS - 1)):
        expected, _, missing = whole[case]
        assert missing == 0
        fed, starved = (rank[case] for rank in (ranks if case[-1] == 0 else ranks[::-1]))
        for output, _, missing in (starved, fed):
            # Both replicas work on the same tokens here.
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            # The reduction of gradients waits for every parameter.
            assert missing == 0, case
        assert starved[1] == 0.0, case
        assert fed[1] > 0.0, case
