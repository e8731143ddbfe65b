"""What users of transformers do with a model: fine-tune it, pack rows, compile it, give it states and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import DataCollatorWithFlattening, DynamicCache, GenerationConfig, Trainer, TrainingArguments

from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.routing import RouterLogits
from more_megatron.hf.exported.system import find_system
from tests.helpers.systems import in_two_tiers
from tests.hf.reference_models import LENGTH, SYSTEMS, VOCABULARY, random_model, tokens

_LENGTHS = (9, 6, 9)


def _packed() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return a row of three documents, its positions that begin anew, [1, s] each, and the documents, [1, s] each."""
    row = tokens().flatten()[: sum(_LENGTHS)].unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS]).unsqueeze(0)
    return row, positions, list(row.split(_LENGTHS, dim=1))


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_packed_documents_are_kept_apart(name: str) -> None:
    model = random_model(name)
    row, positions, documents = _packed()
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    for use_cache in (True, False):
        logits = model(row, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (model(row).logits - expected).abs().max() > 1e-2
    # Beside a row of one document that ends in padding.
    batch, both = torch.cat((row, row.flip(1))), torch.cat((positions, torch.arange(row.size(1)).unsqueeze(0)))
    mask = torch.ones_like(batch)
    mask[1, 20:] = 0
    logits = model(batch, position_ids=both, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1:, :20], model(row.flip(1)[:, :20]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_packed_documents_in_pieces_equal_the_whole(name: str) -> None:
    model = random_model(name)
    row, positions, _ = _packed()
    whole = model(row, position_ids=positions, use_cache=False).logits
    cache, pieces = DynamicCache(), []
    # Cut within a document, at its end, and so that a piece holds the end of one and the beginning of another.
    for start, end in ((0, 12), (12, 15), (15, 16), (16, 24)):
        output = model(row[:, start:end], position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)


def test_masks_of_four_dimensions_are_refused() -> None:
    model, ids = random_model("moe"), tokens()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 24, 24\), and not \(b, T\) = \(2, 24\)"):
        model(ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))


def _trainer(model: MoREForCausalLM, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    rows = [{"input_ids": row, "labels": row} for row in tokens().repeat(4, 1).tolist()]
    collator = arguments.pop("data_collator", None)
    metrics = arguments.pop("compute_metrics", None)
    return Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=metrics,
    )


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("router_logits", [False, True])
def test_trainer_evaluates(name: str, router_logits: bool, tmp_path: Path) -> None:
    model = random_model(name, output_router_logits=router_logits and any(random_model(name).config.moe_layers))
    shapes = []

    def count(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = _trainer(model, tmp_path, compute_metrics=count)
    trainer.train()
    metrics = trainer.evaluate()
    assert 0.0 < metrics["eval_loss"] < 20.0
    assert 0.0 <= metrics["eval_right"] <= 1.0
    assert set(shapes) == {((8, LENGTH, VOCABULARY), (8, LENGTH))}


@pytest.mark.parametrize("name", SYSTEMS)
def test_trainer_with_a_packing_collator(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    _, _, documents = _packed()
    row = DataCollatorWithFlattening()([{"input_ids": document[0].tolist()} for document in documents])
    assert row["input_ids"].shape == (1, sum(_LENGTHS))
    with torch.no_grad():
        loss = model(**row).loss
        # Of each document all tokens but the first are predicted.
        sums = [model(document, labels=document).loss * (document.size(1) - 1) for document in documents]
    assert loss.item() == pytest.approx(sum(sums).item() / (sum(_LENGTHS) - len(_LENGTHS)), rel=1e-5)
    trainer = _trainer(model, tmp_path, data_collator=DataCollatorWithFlattening())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0.0


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_balance_loss_counts_once_a_batch(batch_size: int, tmp_path: Path) -> None:
    """With equal rows every micro-batch has the loss and the balance loss of the batch."""
    model = random_model("moe", router_aux_loss_coef=10.0, output_router_logits=True)
    row = tokens()[:1]
    output = model(row, labels=row)
    expected = torch.autograd.grad(output.loss, model.model.layers[0].mlp.gate.weight)[0]
    norms = []

    class Recorder(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            self.optimizer.register_step_pre_hook(lambda *_: norms.append(model.model.layers[0].mlp.gate.weight.grad))
            return optimizer

    plain = _trainer(model, tmp_path)
    arguments = TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "report_to": [],
            "use_cpu": True,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "learning_rate": 0.0,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 4 // batch_size,
            "disable_tqdm": True,
        }
    )
    rows = [{"input_ids": row[0].tolist(), "labels": row[0].tolist()}] * 4
    Recorder(model, arguments, train_dataset=rows, data_collator=plain.data_collator).train()
    # Older releases count the first token of a row in, which is not predicted.
    ratio = (norms[0] / expected).mean()
    assert min(abs(ratio - 1.0), abs(ratio - (LENGTH - 1) / LENGTH)) < 1e-4
    torch.testing.assert_close(norms[0], ratio * expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_labels_are_shifted_under_label_smoothing(tmp_path: Path) -> None:
    model, ids = random_model("moe"), tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    trainer = _trainer(model, tmp_path, label_smoothing_factor=0.1)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


def test_caches_and_gradient_checkpointing() -> None:
    model, ids = random_model("recurrent_moe"), tokens()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected, cache = model.generate(ids, **settings), model(ids).past_key_values
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **settings), expected)
    with pytest.raises(ValueError, match="what a cache holds cannot be read in training"):
        model(ids, past_key_values=cache)


def test_what_cannot_be_given_is_refused() -> None:
    model, ids, cache = random_model("recurrent_moe"), tokens(), DynamicCache()
    with pytest.raises(ValueError, match="output_attentions has no effect"):
        model(ids, output_attentions=True)
    cache.update(torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8), 0)
    with pytest.raises(ValueError, match="the cache was filled by another kind of model"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="a tuple cannot hold the states of a MoRE model: use a DynamicCache"):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 1\), and not \(b, s\) = \(2, 24\)"):
        model(ids, position_ids=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="packed rows need position_ids"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 9, LENGTH]))
    model.config.mean_recurrence = 0
    with pytest.raises(ValueError, match="num_steps 0 must be at least 1"):
        model(ids)


@pytest.mark.parametrize("name", in_two_tiers(name for name in SYSTEMS if find_system(name).traceable))
def test_one_graph(name: str) -> None:
    model, ids = random_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}, {"position_ids": _packed()[1].expand(2, -1)}):
            found = compiled(ids, use_cache=False, **kwargs).logits
            torch.testing.assert_close(found, model(ids, use_cache=False, **kwargs).logits, atol=1e-5, rtol=0)
    losses = [run(ids, labels=ids, use_cache=False).loss for run in (compiled, model)]
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", in_two_tiers(name for name in SYSTEMS if find_system(name).traceable))
def test_exported_program(name: str) -> None:
    model, ids = random_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    program = torch.export.export(model, (), kwargs, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**kwargs).logits, model(**kwargs).logits, atol=1e-5, rtol=0)


def test_exported_program_of_any_size() -> None:
    model, ids = random_model("recurrent_moe"), tokens()
    sizes = {0: torch.export.Dim("b", min=2, max=64), 1: torch.export.Dim("s", min=2, max=64)}
    kwargs, shapes = {"input_ids": ids, "use_cache": False}, {"input_ids": sizes, "use_cache": None}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
    other = ids.repeat(2, 1)[:3, :11]
    with torch.no_grad():
        found = program.module()(input_ids=other, use_cache=False).logits
        torch.testing.assert_close(found, model(other).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [2.7, "3", True, torch.tensor(2.0), [2]])
def test_numbers_of_steps_are_integers(num_steps: Any) -> None:
    model, ids = random_model("recurrent_moe"), tokens()
    with pytest.raises(ValueError, match="must be an integer"):
        model(ids, num_steps=num_steps)
    with pytest.raises(ValueError, match="must be an integer"):
        model.generate(ids, num_steps=num_steps, max_new_tokens=1, pad_token_id=0)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if find_system(name).num_states(random_model(name).config)])
def test_generation_from_given_states(name: str) -> None:
    model, ids = random_model(name), tokens()
    generator = torch.Generator().manual_seed(1)
    shape = (find_system(name).num_states(model.config), *ids.shape, model.config.hidden_size)
    states = torch.randn(shape, generator=generator)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings["return_dict_in_generate"] = True
    found, plain = (model.generate(ids, input_states=states, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)
    without = model.generate(ids, **settings)
    assert (torch.stack(found.logits) - torch.stack(without.logits)).abs().max() > 1e-3
    beams = [
        model.generate(ids, input_states=states, use_cache=use, num_beams=3, max_new_tokens=6, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", SYSTEMS)
def test_generation_from_embeddings(name: str) -> None:
    model, ids = random_model(name), tokens()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), plain[:, LENGTH:])
    assert torch.equal(model.generate(inputs_embeds=embeddings, use_cache=False, **settings), plain[:, LENGTH:])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_experts_per_tok", 99, "num_experts_per_tok 99 must be at most 4"),
        ("rope_theta", "5e5", "rope_theta '5e5' must be a finite number"),
        ("num_hidden_layers", 1, "moe_layers names 2 layers of 1"),
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0}, "has no effect: rope_theta and rope_scaling_factor"),
        ("attention_dropout", 0.1, "attention_dropout 0.1 has no effect"),
    ],
)
def test_changed_configurations_are_checked(name: str, value: Any, message: str, tmp_path: Path) -> None:
    random_model("moe").save_pretrained(tmp_path)
    config = MoREForCausalLM.config_class.from_pretrained(tmp_path)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        MoREForCausalLM.from_pretrained(tmp_path, config=config)


def test_options_in_a_generation_configuration(tmp_path: Path) -> None:
    model, ids = random_model("recurrent_moe"), tokens()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings["return_dict_in_generate"] = True
    expected = {steps: torch.stack(model.generate(ids, num_steps=steps, **settings).logits) for steps in (1, 2)}
    found = model.generate(ids, GenerationConfig(num_steps=1, **settings)).logits
    assert torch.equal(torch.stack(found), expected[1])
    model.generation_config = GenerationConfig(num_steps=1)
    model.save_pretrained(tmp_path)
    model = MoREForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.stack(model.generate(ids, **settings).logits), expected[1])
    # Arguments stand over the configuration.
    assert torch.equal(torch.stack(model.generate(ids, num_steps=2, **settings).logits), expected[2])
    drafted = model.generate(ids, GenerationConfig(num_steps=2, draft_steps=1, **settings))
    assert drafted.verifications > 0


def test_states_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="input_states has no effect"):
        random_model("moe")(tokens(), input_states=torch.zeros(2, 2, LENGTH, 32))


@torch.no_grad()
def test_router_logits_know_where_they_were_made() -> None:
    model, ids = random_model("recurrent_moe", moe_layers=[True, False]), tokens()
    logits = model(ids, output_router_logits=True, num_steps=3).router_logits
    assert (logits.layers, logits.steps, logits.routers) == ((0, 0, 0), (0, 1, 2), ("router",) * 3)
    assert torch.equal(logits.at(0, 2), logits[2])
    with pytest.raises(KeyError, match="0 routing decisions in layer 1, step 0"):
        logits.at(1)
    # As transformers rebuilds tuples.
    assert type(logits)(part.cpu() for part in logits) == RouterLogits(logits)


@pytest.mark.parametrize("name", SYSTEMS)
def test_tokens_that_are_added_can_be_generated(name: str) -> None:
    """A row that only padded the vocabulary becomes a token by fine-tuning."""
    model, ids = random_model(name), tokens()[:1]
    added = VOCABULARY - 1
    with torch.no_grad():
        # What fine-tuning does to its row.
        output = model(ids).logits[0, -1]
        head = model.get_output_embeddings()
        state = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        head.weight[added] = state / state.norm() ** 2 * (output.max() + 1.0)
    made = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert made[0, -1] == added


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_weights_that_are_fetched_while_a_module_is_called(name: str) -> None:
    """As accelerate does for weights on a disk: a module must use its weights in its `forward`, and none of others."""
    model, ids = random_model(name), tokens()
    calls: list[dict[str, Any]] = [{}, *([{"criterion": "kl"}] if find_system(name).recurrent else [])]
    expected = [model(ids, **options).logits for options in calls]
    cpu_offload(model, torch.device("cpu"))
    for options, logits in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(ids, **options).logits, logits)
