"""The tool from files to datasets: formats, identity with Megatron's builder, errors, resuming."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from more_megatron.data.sources import open_source
from more_megatron.errors import MoREError
from tests.data.conftest import TOOL, assert_one_line, run_tool, write_like_megatron

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2"


def write_jsonl(path: Path, documents: list[str], copies: int = 1, ensure_ascii: bool = True) -> Path:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=ensure_ascii) + "\n" for text in documents)
    path.write_text(lines * copies, encoding="utf-8")
    return path


def same_files(first: Path, second: Path) -> bool:
    return all(Path(f"{first}{end}").read_bytes() == Path(f"{second}{end}").read_bytes() for end in (".bin", ".idx"))


@pytest.fixture(scope="module")
def model(model_path: Callable[[str], str]) -> str:
    return model_path("bpe")


@pytest.fixture(scope="module")
def hostile(corpus: list[str]) -> list[str]:
    return ["", *corpus[:60], "a\0b", " \u2581 </s> ", "\r\nx\r\n", "😀 e\u0301", "", "  ", corpus[60] * 3]


def test_same_files_as_megatrons_builder(tmp_path: Path, model: str, hostile: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    data = write_jsonl(tmp_path / "in.jsonl", hostile, copies=40)
    result = run_tool("--input", data, "--output-prefix", tmp_path / "ours", "--tokenizer-model", model, "--workers", 2)
    assert result.returncode == 0, result.stderr
    theirs = tmp_path / "theirs_text_document"
    write_like_megatron(str(theirs), hostile * 40, processor.encode_as_ids, processor.eos_id(), np.uint16)
    assert same_files(tmp_path / "ours_text_document", theirs)
    manifest = json.loads((tmp_path / "ours_text_document.json").read_text())
    assert manifest["documents"] == len(hostile) * 40
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in hostile) * 40
    assert manifest["words"] == sum(len(text.encode().split()) for text in hostile) * 40
    assert not list(tmp_path.glob("*.partial"))


def test_every_format_gives_the_same_dataset(tmp_path: Path, model: str, corpus: list[str]) -> None:
    text = "".join(f" \n = Title {number} = \n \n {body.strip()} \n" for number, body in enumerate(corpus[:40]))
    files = {"text.tokens": text.encode(), "text.txt": text.encode(), "text.raw.gz": gzip.compress(text.encode())}
    try:
        import zstandard

        files["text.txt.zst"] = zstandard.ZstdCompressor().compress(text.encode())
    except ImportError:
        pass
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        result = run_tool("--input", tmp_path / name, "--output-prefix", tmp_path / name, "--tokenizer-model", model)
        assert result.returncode == 0, result.stderr
        assert same_files(tmp_path / f"{name}_text_document", tmp_path / "text.tokens_text_document")
        assert json.loads((tmp_path / f"{name}_text_document.json").read_text())["documents"] == 40


def test_parquet(tmp_path: Path, model: str, corpus: list[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": corpus[:50]}), tmp_path / "rows.parquet", row_group_size=7)
    rows = [line for body in corpus[:5] for line in ("", f" = T{len(body)} = \n", "", f" {' '.join(body.split())} \n")]
    parquet.write_table(arrow.table({"text": rows}), tmp_path / "lines.parquet")
    counts = []
    for name in ("rows", "lines"):
        prefix = tmp_path / name
        result = run_tool("--input", f"{prefix}.parquet", "--output-prefix", prefix, "--tokenizer-model", model)
        assert result.returncode == 0, result.stderr
        counts.append(json.loads(Path(f"{prefix}_text_document.json").read_text())["documents"])
    assert counts == [50, 5]


def test_rows_are_documents_as_they_stand(tmp_path: Path, model: str, hostile: list[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = [*hostile, " = T = ", "a\n\nb\n", '{"text": "a"}', '\u2028 \x85 \\ "']
    parquet.write_table(arrow.table({"text": documents}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", documents)
    for name in ("a.parquet", "b.jsonl"):
        result = run_tool("--input", tmp_path / name, "--output-prefix", tmp_path / name[0], "--tokenizer-model", model)
        assert result.returncode == 0, result.stderr
    assert same_files(tmp_path / "a_text_document", tmp_path / "b_text_document")


def test_globs_keep_order_and_many_inputs_follow_each_other(tmp_path: Path, model: str, corpus: list[str]) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"part{number}.jsonl", corpus[number * 10 : number * 10 + 10], ensure_ascii=False)
    write_jsonl(tmp_path / "all.jsonl", corpus[:30])
    for prefix, pattern in (("a", "part*.jsonl"), ("b", "all.jsonl")):
        result = run_tool(
            "--input", tmp_path / pattern, "--output-prefix", tmp_path / prefix, "--tokenizer-model", model
        )
        assert result.returncode == 0, result.stderr
    assert same_files(tmp_path / "a_text_document", tmp_path / "b_text_document")


def test_play_without_headings_trains_a_tokenizer_and_verifies(tmp_path: Path, corpus: list[str]) -> None:
    text = "\n\n".join(f"ROMEO:\n{paragraph.strip()}" for body in corpus for paragraph in body.split("\n\n"))
    (tmp_path / "play.txt").write_text(text)
    prefix = tmp_path / "play"
    arguments = ["--input", f"{prefix}.txt", "--output-prefix", prefix, "--train-tokenizer", "--vocab-size", 2000]
    result = run_tool(*arguments, "--verify")
    assert result.returncode == 0, result.stderr
    assert re.search(r"(\d+) documents encoded again .* the same, \1 of them decode to their exact text", result.stderr)
    manifest = json.loads(Path(f"{prefix}_text_document.json").read_text())
    assert manifest["documents"] > 50
    assert manifest["tokenizer"]["vocab_size"] == 2000
    assert manifest["tokenizer"]["model"] == f"{prefix}_tokenizer.model"


@pytest.mark.skipif(not SHARED.exists(), reason="WikiText-2 is not here")
def test_wikitext_2(tmp_path: Path, model: str) -> None:
    files = sorted(SHARED.glob("*.tokens"))
    result = run_tool("--input", *files, "--output-prefix", tmp_path / "w", "--tokenizer-model", model)
    assert result.returncode == 0, result.stderr
    # Two lines of a formula look like headings inside a paragraph.
    assert json.loads((tmp_path / "w_text_document.json").read_text())["documents"] == 120


BAD_INPUTS: dict[str, tuple[bytes, list[str]]] = {
    "empty.txt": (b"", ["empty.txt", "is empty"]),
    "blank.txt": (b" \n \n", ["no text", "blank.txt"]),
    "wide.txt": ("of two bytes\n".encode("utf-16-le"), ["wide.txt", "byte 0", "NUL bytes, as binary files and UTF-16"]),
    "latin.txt": (b"caf\xe9 au lait\n", ["latin.txt", "not UTF-8", "offset 3"]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', ["latin.jsonl", "not UTF-8", "offset 24"]),
    "key.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        ["key.jsonl", "line 2 (byte 14)", "'text', only body", "--json-key"],
    ),
    "number.jsonl": (b'{"text": 3}\n', ["number.jsonl", "byte 0", "a number, not text"]),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", ["line 1 (byte 0)", "a number, not text, under 'text'"]),
    "minus.jsonl": (b'{"text": -' + b"9" * 5000 + b"}\n", ["line 1 (byte 0)", "a number, not text, under 'text'"]),
    "pretty.json": (b'{\n  "text": "a"\n}\n', ["line 1 (byte 0)", "no JSON object"]),
    "broken.jsonl": (b'{"text": "a"\n', ["broken.jsonl", "byte 0", "no JSON", "Expecting ',' delimiter at column 13"]),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', ["line 2", "a list, no object", "--skip-bad-lines"]),
    "deep.jsonl": (b"[" * 100_000, ["line 1", "nested too deeply"]),
    "half.jsonl": (b'{"text": "\\ud800"}\n', ["half.jsonl", "surrogate pair (\\ud800)"]),
    "cut.txt.gz": (gzip.compress(os.urandom(1000))[:500], ["cut.txt.gz", "damaged gz"]),
    "not.txt.gz": (b"plain", ["not.txt.gz", "damaged gz"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_ends_in_one_line(name: str, tmp_path: Path, model: str) -> None:
    data, words = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(data)
    arguments = ["--input", tmp_path / name, "--output-prefix", tmp_path / "out", "--tokenizer-model", model]
    assert_one_line(run_tool(*arguments, "--no-progress"), *words)
    assert not list(tmp_path.glob("out*"))


def test_bad_arguments_end_in_one_line(tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus[:3])
    out = ["--output-prefix", tmp_path / "out", "--no-progress"]
    usual = ["--input", data, *out]
    (tmp_path / "bad.model").write_bytes(b"nothing")
    assert_one_line(run_tool("--input", tmp_path / "no.txt", *out, "--tokenizer-model", model), "does not exist")
    assert_one_line(run_tool("--input", tmp_path, *out, "--tokenizer-model", model), "is a folder")
    assert_one_line(run_tool(*usual), "needs --tokenizer-model")
    assert_one_line(run_tool(*usual, "--tokenizer-model", "no.model"), "no.model", "does not exist")
    assert_one_line(run_tool(*usual, "--tokenizer-model", tmp_path / "bad.model"), "bad.model", "damaged")
    assert_one_line(run_tool(*usual, "--train-tokenizer", "--vocab-size", 90000), "90000 is too large", "or less")
    inside = ["--input", data, "--output-prefix", data / "x", "--no-progress", "--tokenizer-model", model]
    assert_one_line(run_tool(*inside), "cannot write", "Not a directory")
    os.mkfifo(tmp_path / "pipe")
    assert_one_line(run_tool("--input", tmp_path / "pipe", *out, "--tokenizer-model", model), "is a pipe or a device")
    assert_one_line(run_tool(*usual, "--tokenizer-model", model, "--workers", 10**6), "at most 1000")
    assert run_tool("--input", data, "--output-prefix", "", "--tokenizer-model", model).returncode == 2
    assert run_tool(*usual, "--tokenizer-type", "Nonsense").returncode == 2
    assert run_tool(*usual, "--train-tokenizer").returncode == 2
    assert not list(tmp_path.glob("out*"))


def test_full_disk_ends_in_one_line_and_resumes(tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=12)
    arguments = ["--input", data, "--tokenizer-model", model, "--no-progress", "--workers", "2"]
    command = [sys.executable, TOOL, *arguments, "--output-prefix", tmp_path / "full"]
    # A limit on the size of a file stands in for a full disk.
    limited = f"trap '' XFSZ; ulimit -f 1200; exec {' '.join(map(str, command))}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)
    assert_one_line(result, "cannot write", "full_text_document.partial/tokens", "--resume")
    assert [path.name for path in tmp_path.glob("full*")] == ["full_text_document.partial"]
    resumed = run_tool(*arguments, "--output-prefix", tmp_path / "full", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert run_tool(*arguments, "--output-prefix", tmp_path / "free").returncode == 0
    assert same_files(tmp_path / "full_text_document", tmp_path / "free_text_document")


def blocks_done(folder: Path) -> int:
    try:
        return int(json.loads((folder / "done.json").read_text())["blocks"])
    except FileNotFoundError:
        return 0


def kill_when_written(command: list[Any], folder: Path, blocks: int) -> None:
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while blocks_done(folder) < blocks and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_resume_after_kill(tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=30)
    folder = tmp_path / "killed_text_document.partial"
    usual = ["--input", data, "--tokenizer-model", model, "--no-progress", "--workers", 2]
    command = [*usual, "--output-prefix", tmp_path / "killed"]
    kill_when_written([TOOL, *command, "--encoder", "reference"], folder, 3)
    assert not (tmp_path / "killed_text_document.idx").exists()
    done = blocks_done(folder)
    assert done >= 3
    # What was written after the last good state does not count.
    with open(folder / "tokens", "ab") as tokens, open(folder / "lengths", "ab") as lengths:
        tokens.write(b"garbage")
        lengths.write(b"more")
    kept = (folder / "tokens").read_bytes()[:1000]
    assert_one_line(
        run_tool(*command, "--encoder", "reference", "--no-append-eod", "--resume"), "cannot resume", "append_eod"
    )
    resumed = run_tool(*command, "--encoder", "reference", "--workers", 3, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    fresh = run_tool(*usual, "--output-prefix", tmp_path / "fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert same_files(tmp_path / "killed_text_document", tmp_path / "fresh_text_document")
    assert (tmp_path / "killed_text_document.bin").read_bytes()[:1000] == kept
    assert not folder.exists()


def test_parts_by_two_encoders_are_not_mixed(tmp_path: Path, model: str, corpus: list[str]) -> None:
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=30)
    command = ["--input", data, "--output-prefix", tmp_path / "x", "--tokenizer-model", model, "--no-progress"]
    kill_when_written([TOOL, *command, "--encoder", "reference"], tmp_path / "x_text_document.partial", 1)
    assert_one_line(run_tool(*command, "--resume"), "cannot resume", "encoder")


def test_kill_then_start_clean(tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=10)
    command = [TOOL, "--input", data, "--output-prefix", tmp_path / "x", "--tokenizer-model", model, "--no-progress"]
    kill_when_written([*command, "--workers", 2], tmp_path / "x_text_document.partial", 1)
    assert run_tool(*command[1:]).returncode == 0
    assert sorted(path.suffix for path in tmp_path.glob("x*")) == [".bin", ".idx", ".json"]


@pytest.mark.parametrize("name", ["tokens", "lengths", "done.json", "plan.json"])
def test_resume_without_a_whole_state_starts_clean(name: str, tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=10)
    usual = ["--input", data, "--tokenizer-model", model, "--no-progress", "--encoder", "reference"]
    command = [*usual, "--output-prefix", tmp_path / "x"]
    kill_when_written([TOOL, *command], tmp_path / "x_text_document.partial", 2)
    path = tmp_path / "x_text_document.partial" / name
    path.write_bytes(path.read_bytes()[:10])
    assert run_tool(*command, "--resume").returncode == 0
    assert run_tool(*usual, "--output-prefix", tmp_path / "y").returncode == 0
    assert same_files(tmp_path / "x_text_document", tmp_path / "y_text_document")


def test_two_runs_on_one_prefix(tmp_path: Path, model: str, corpus: list[str]) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", corpus, copies=30)
    command = ["--input", data, "--output-prefix", tmp_path / "x", "--tokenizer-model", model, "--no-progress"]
    first = subprocess.Popen([sys.executable, TOOL, *map(str, command), "--encoder", "reference"])
    while not blocks_done(tmp_path / "x_text_document.partial") and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second has started
    try:
        assert_one_line(run_tool(*command), "another run is writing", "x_text_document", "--output-prefix")
        assert_one_line(run_tool(*command, "--resume"), "another run is writing")
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert run_tool(*command, "--verify").returncode == 0
    assert sorted(path.suffix for path in tmp_path.glob("x*")) == [".bin", ".idx", ".json"]


def test_bad_lines_are_left_out_on_request(tmp_path: Path, model: str, corpus: list[str]) -> None:
    digits = "9" * 5000
    good = [json.dumps({"n": 1, "text": text}) for text in corpus] * 8
    good[1] = f'{{"id": {digits}, "text": "a number of 5,000 digits beside the text"}}'
    bad = [
        "{",
        "[1]",
        f'{{"text": {digits}}}',
        '{"body": ""}',
        '{"text": null}',
        '{"text": "\\ud800"}',
        '{"text": NaN}',
    ]
    lines = [line.encode() for line in [*good, bad[0], *good[::-1], *bad[1:]]] + [b'{"text": "\xff"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "good.jsonl").write_text("\n".join([*good, *good[::-1]]))
    arguments = ["--output-prefix", tmp_path / "x", "--tokenizer-model", model, "--no-progress"]
    refused = run_tool("--input", tmp_path / "in.jsonl", *arguments)
    assert_one_line(refused, f"line {len(good) + 1} ", "column 2", "--skip-bad-lines", "--resume")
    # What was finished before the bad line is used.
    assert blocks_done(tmp_path / "x_text_document.partial") > 0
    result = run_tool("--input", tmp_path / "in.jsonl", *arguments, "--skip-bad-lines", "--resume", "--verify")
    assert result.returncode == 0, result.stderr
    assert f"{len(bad) + 1} bad lines left out" in result.stderr
    assert json.loads((tmp_path / "x_text_document.json").read_text())["skipped"] == len(bad) + 1
    assert run_tool("--input", tmp_path / "good.jsonl", *arguments[:1], tmp_path / "y", *arguments[2:]).returncode == 0
    assert same_files(tmp_path / "x_text_document", tmp_path / "y_text_document")


def test_json_lines_of_another_name_are_recognised(tmp_path: Path, model: str, corpus: list[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", corpus[:20])
    (tmp_path / "in.dump").write_bytes(b"\n" + (tmp_path / "in.jsonl").read_bytes())
    arguments = ["--tokenizer-model", model, "--no-progress"]
    result = run_tool("--input", tmp_path / "in.dump", "--output-prefix", tmp_path / "a", *arguments)
    assert "in.dump holds JSON lines" in result.stderr
    assert run_tool("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "b", *arguments).returncode == 0
    assert same_files(tmp_path / "a_text_document", tmp_path / "b_text_document")
    as_text = ["--input", tmp_path / "in.dump", "--output-prefix", tmp_path / "c", "--layout", "plain"]
    assert "JSON lines" not in run_tool(*as_text, *arguments).stderr
    assert not same_files(tmp_path / "a_text_document", tmp_path / "c_text_document")


def test_parquet_columns_that_are_no_text(tmp_path: Path, model: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "number": [1, 2],
        "float": [0.5, None],
        "list": [["a"], ["b"]],
        "bytes": [b"a", b"b"],
        "record": [{"text": "a"}, {"text": "b"}],
        "codes": arrow.array([1, 2]).dictionary_encode(),
        "text": ["a", None],
        "words": arrow.array(["a", "a"]).dictionary_encode(),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "in.parquet")
    arguments = ["--input", tmp_path / "in.parquet", "--output-prefix", tmp_path / "x", "--tokenizer-model", model]
    kinds = {"number": "int64", "float": "double", "list": "list<", "bytes": "binary", "record": "struct<"}
    for key, kind in {**kinds, "codes": "int64"}.items():
        with pytest.raises(MoREError, match=f"column '{key}' holds {kind}.*, not text; choose one with --json-key"):
            open_source(str(tmp_path / "in.parquet"), key)
    assert_one_line(run_tool(*arguments, "--no-progress", "--json-key", "bytes"), "column 'bytes' holds binary")
    assert_one_line(run_tool(*arguments, "--no-progress", "--json-key", "x"), "no column 'x'", "number, float, list")
    assert run_tool(*arguments, "--json-key", "words").returncode == 0
    assert run_tool(*arguments).returncode == 0
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-9])
    assert_one_line(run_tool(*arguments, "--no-progress"), "damaged Parquet")
    assert json.loads((tmp_path / "x_text_document.json").read_text())["documents"] == 2


def test_help_is_quick() -> None:
    # Processor time, since a busy machine says nothing about the tool.
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_tool("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5


def test_nothing_heavy_is_imported() -> None:
    code = (
        f"import sys; sys.argv=['t','--help']; sys.path.insert(0, {str(TOOL.parent)!r}); import preprocess_wikitext; "
    )
    code += "print([m for m in ('torch', 'megatron', 'transformers', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
