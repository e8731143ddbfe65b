"""A system that starts from a checkpoint of another one takes what both have, and says what it draws anew."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from more_megatron.evaluation.gpu_check.work.tensors import lay, sharded
from more_megatron.systems import get_system, systems
from more_megatron.training.former_weights import ask_for_former_weights
from tests.helpers.models import HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.program import finished
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY

_WIDTH = 2 * HIDDEN
_STARTED = [name for name, system in systems().items() if system.former_keys]

Weights = dict[str, torch.Tensor]


def _weights(model: GPTModel) -> Weights:
    """Return whole tensors by their keys in checkpoints, without numbers where another rank holds them."""
    found: Weights = {}
    for value in nested_values(sharded(model)):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            lay(found, value)
    return {key: tensor.clone() for key, tensor in found.items()}


def _started(name: str, folder: Path, gated: bool) -> tuple[Weights, Weights, Weights]:
    """Return the weights of a model of Megatron's, and those of a system before and after it starts from them."""
    start_ranks()
    activation = torch.nn.functional.silu if gated else torch.nn.functional.gelu
    fields = {"num_layers": 2, "moe_ffn_hidden_size": _WIDTH, "gated_linear_unit": gated, "activation_func": activation}
    former = gpt_model(small_config("moe", **fields), 8, weight_std=0.2)
    weights = _weights(former)
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    arguments = Namespace(more_variant="moe", swiglu=gated, add_bias_linear=False)
    dist_checkpointing.save({**sharded(former), "args": arguments}, str(folder))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("1")
    ranks = torch.distributed.get_world_size()
    start_ranks(tensor=ranks)
    split = {"tensor_model_parallel_size": ranks, "expert_tensor_parallel_size": ranks, "sequence_parallel": ranks > 1}
    model = gpt_model(small_config(name, **fields, **split), 8)
    before = _weights(model)
    args = {"finetune": True, "ckpt_format": "torch_dist", "load": str(folder.parent), "pretrained_checkpoint": None}
    ask_for_former_weights(Namespace(more_variant=name, rank=1, ckpt_step=None, **args), [model])
    loaded = dist_checkpointing.load(sharded(model), str(folder))
    model.load_state_dict({name: value for name, value in loaded.items() if name != "args"}, strict=True)
    assert _weights(model).keys() == before.keys()
    return weights, before, _weights(model)


def _together(parts: list[Weights]) -> Weights:
    return {key: torch.stack([part[key] for part in parts]).nan_to_num(nan=-torch.inf).amax(0) for key in parts[0]}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", _STARTED)
def test_a_model_takes_what_the_former_has(name: str, gated: bool, ranks: int, tmp_path: Path) -> None:
    found = run_ranks(ranks, _started, name, tmp_path / "iter_0000001", gated)
    former, before, after = found[0][0], *(_together([rank[place] for rank in found]) for place in (1, 2))
    system, prefix = get_system(name), "decoder.layers."
    own = {f"{prefix}{row.megatron}" for row in system.expert_rows}
    taken = {f"{prefix}{key}": f"{prefix}{other}" for key, other in system.former_keys.items() if "bias" not in key}
    for key, tensor in after.items():
        if key in taken:
            # Of a gated expansion the half that the gate lets through.
            whole = former[taken[key]]
            assert torch.equal(tensor, whole[:, :, -_WIDTH:] if "fc1" in key else whole), key
        else:
            assert torch.equal(tensor, before[key] if key in own else former[key]), key


def test_what_is_drawn_anew_is_named_in_one_line(tmp_path: Path) -> None:
    run = f"{TINY} --train-iters 1 --num-layers 2"
    finished(f"{run} --more-variant moe --save {tmp_path} --save-interval 1")
    output = finished(f"{run} --more-variant gru_experts --finetune --load {tmp_path}")
    (line,) = [line for line in output.splitlines() if "drawn anew" in line]
    assert line.startswith("> gru_experts starts from moe; drawn anew: ")
    assert "mlp.experts.gru.weight" in line
    assert "fc1.weight" not in line
