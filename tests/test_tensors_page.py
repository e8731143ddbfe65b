"""docs/tensors.md says what the name tables of the systems say; `python -m tests.test_tensors_page` writes it anew."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from more_megatron.systems import export, get_system, names
from more_megatron.systems.export import Row

_PAGE = Path(__file__).parents[1] / "docs" / "tensors.md"

# Three layers of which one is repeated, with everything that adds rows.
_CONFIG = {
    "num_hidden_layers": 3,
    "prelude_layers": 1,
    "coda_layers": 1,
    "injection": "linear",
    "time_signal": "learned",
    "halting": "act",
    "num_head_experts": 4,
}
_SHARED = {
    "outside of layers": export.MODEL,
    "attention": export.ATTENTION,
    "dense MLP": export.DENSE,
    "dense MLP with biases": export.DENSE_WITH_BIASES,
    "MoE layer": export.MOE,
    "Megatron's experts": export.FEED_FORWARD,
    "sandwich norms": export.SANDWICH,
}
_HEAD = "| checkpoint | export | shape | if |\n|---|---|---|---|"
_INTRODUCTION = """# Names and shapes of tensors

What a computation from weights of ours has to read: each parameter's key in a checkpoint, its name in an export, and
its shape in the checkpoint. `decoder.layers.` stands before keys of layers, `model.layers.I.` before names. Where all
layers have a parameter, Megatron keeps it in one tensor with the layers in front, otherwise it writes
`decoder.layers.I.`. `[a, b]` takes b channels to a, `y = W x`; `2 f` in front is a gate and, below it, what it gates.
`{q,k,v}` names three tensors that Megatron interleaves: for each group of queries its queries, its key, its value.
[conversion.md](conversion.md) has the rest of the way there and back, [cells.md](cells.md) the order of a cell's
gates, [looped.md](looped.md) what adapters and loops compute: an adapter's first h columns are for the state, the
others for the input.

| size | | size | |
|---|---|---|---|
| V | vocabulary, padded | N | routed experts |
| P | learned positions | m | `--moe-ffn-hidden-size` |
| h | `--hidden-size` | e | `--moe-shared-expert-intermediate-size` |
| d | channels of a head | R | `--recurrence-ffn-hidden-size` |
| q, k | channels of all queries, of all keys | T | steps of the learned time signal |
| qkv | q + 2 k | H, E | heads, experts of a head (`--switchhead-num-experts`) |
| f | `--ffn-hidden-size` | | |

"If" says what a row needs, and with `!` what it must not have: `tied` embeddings, `learned_positions`, LayerNorm
(`layernorm`), `--qk-layernorm`, `--add-qkv-bias` (`qkv_bias`), biases of linear layers (`bias`), a gated MLP
(`--swiglu` and its kin), a shared expert and its gate, `--moe-router-enable-expert-bias` (`expert_bias`), several
experts a head (`head_experts`). A dense MLP with biases has them without `bias`. `universal` has the sandwich norms
with `--universal-post-norm`, in place of the norms in front and of the last one; the signal and halting by their
flags; `loop` its adapter with `--recurrence-injection linear`, one for each group."""


def _parts() -> list[str]:
    return [_INTRODUCTION, *_shared(), *map(_of_system, names())]


def _shared() -> Iterator[str]:
    yield "## What systems share"
    for title, rows in _SHARED.items():
        if title != "dense MLP with biases":
            yield f"### {title[0].upper()}{title[1:]}"
            yield _table(rows)


def _of_system(name: str) -> str:
    """Return the section of a system: the shared tables that it has, and the rows that are in none of them."""
    system = get_system(name)
    rows: dict[Row, None] = {}
    for post_norm in (False, True):
        config: dict[str, Any] = {**_CONFIG, "post_norm": post_norm, "moe_layers": [False, True, True]}
        rows.update(dict.fromkeys(system.model_rows(config)))
        for layer in (0, 1):
            rows.update(dict.fromkeys(system.layer_rows(config, layer)))
    used = [title for title, table in _SHARED.items() if _main_row(table) in rows]
    own = [row for row in rows if not any(row in table for table in _SHARED.values())]
    text = f"## `{name}`\n\nShared: {', '.join(used)}."
    return f"{text} Its own:\n\n{_table(own)}" if own else text


def _main_row(table: Sequence[Row]) -> Row:
    """Return the row by which a table is known: the last that is not of norms, so that biases do not count."""
    return next((row for row in reversed(table) if row.when != "layernorm" and "norm_" not in row.megatron), table[0])


def _table(rows: Iterable[Row]) -> str:
    lines = (f"| `{row.megatron}` | `{row.hf}` | {_shape(row)} | {row.when or ' '} |" for row in rows)
    return "\n".join([_HEAD, *lines])


def _shape(row: Row) -> str:
    return f"[{', '.join(size.replace('*', ' ') for size in row.shape.split())}]"


def test_it_says_what_the_name_tables_say() -> None:
    page = _PAGE.read_text()
    for part in _parts():
        assert f"{part}\n" in page, "write it anew: python -m tests.test_tensors_page"


if __name__ == "__main__":
    _PAGE.write_text("\n\n".join(_parts()) + "\n")
