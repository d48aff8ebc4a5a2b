"""Bad input ends before training, with file, line or field, and what to do. No message carries a row's text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.errors import DataError, FinetuneError, ModelError, SpecError, StorageError
from finetune_api.run import PREPARED
from finetune_trainer.prepare import prepare, read
from tests.tiny import tiny_llama
from tests.trainer.jobs import chat, chats, jsonl, run_config

SECRET = "quetzalcoatl"  # stands in every bad row; must be in no message
GOOD = jsonl(chats(3))
USER = {"role": "user", "content": SECRET}
ASSISTANT = {"role": "assistant", "content": SECRET}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def fails(kind: type[FinetuneError], folder: Path, model: Path, **config: Any) -> FinetuneError:
    """The error that prepare ends with; it says what to do, and leaves nothing prepared."""
    run = run_config(folder, model, **config)
    with pytest.raises(FinetuneError) as caught:
        prepare(run, workers=0)
    assert type(caught.value) is kind, caught.value
    assert SECRET not in str(caught.value)
    assert "→" in str(caught.value), "it says what to do"
    assert not list(Path(run.work).glob(PREPARED + "*")), "a half result is left"
    return caught.value


def row(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


# Name: bytes of the row that stands in line 4, field, and a part of what is said.
BAD_ROWS: dict[str, tuple[bytes, str, str]] = {
    "not JSON": (b'{"messages": [' + SECRET.encode(), "", "not JSON"),
    "cut off": (GOOD[:40], "", "not JSON"),
    "not an object": (b"[1, 2]", "", "not an object"),
    "NaN": (b'{"text": NaN}', "", "NaN"),
    "wrong encoding": (f'{{"text": "{SECRET} é"}}'.encode("latin-1"), "", "byte 24 of the line is not UTF-8"),
    "UTF-16 in the middle": (f'{{"text": "{SECRET}"}}'.encode("utf-16-le"), "", "UTF-16"),
    "half a surrogate pair": (
        row({"role": "user", "content": "a\ud83d"}, ASSISTANT),
        "messages[0].content",
        "surrogate",
    ),
    "nested too deeply": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "nested too deeply"),
    "no known field": (b'{"question": "%s"}' % SECRET.encode(), "", "none of the fields"),
    "both formats": (row(USER, ASSISTANT, text=SECRET), "messages, text", "two formats, chat and text"),
    "another format than the file": (b'{"text": "%s"}' % SECRET.encode(), "text", "the file began with chat"),
    "null messages": (b'{"messages": null}', "messages", "null"),
    "messages are text": (b'{"messages": "%s"}' % SECRET.encode(), "messages", "not JSON"),
    "no messages": (row(), "messages", "empty"),
    "a message is text": (row(SECRET), "messages[0]", "not an object"),
    "no role": (row({"content": SECRET}), "messages[0].role", "missing"),
    "unknown role": (row({"role": SECRET, "content": "a"}), "messages[0].role", "not known"),
    "no content": (row({"role": "user"}), "messages[0].content", "missing"),
    "null content": (row(USER, {"role": "assistant", "content": None}), "messages[1].content", "null"),
    "empty content": (row(USER, {"role": "assistant", "content": "  "}), "messages[1].content", "empty"),
    "content is a list": (row({"role": "user", "content": [SECRET]}), "messages[0].content", "a list"),
    "system comes late": (row(USER, {"role": "system", "content": "a"}), "messages[1].role", "after user"),
    "assistant comes first": (row(ASSISTANT), "messages[0].role", "at the start"),
    "two users in a row": (row(USER, USER), "messages[1].role", "after user"),
    "a tool nobody called": (
        row(USER, ASSISTANT, {"role": "tool", "content": "a"}),
        "messages[2].role",
        "after assistant",
    ),
    "no answer": (row(USER), "messages[0].role", "no answer to learn"),
    "a user with weight": (row({**USER, "weight": 1}, ASSISTANT), "messages[0].weight", "user message has a weight"),
    "a weight above 100": (row(USER, {**ASSISTANT, "weight": 101}), "messages[1].weight", "from 0 to 100"),
    "nothing to learn": (row(USER, {**ASSISTANT, "weight": 0}), "", "nothing to learn"),
    "a control token": (
        row({"role": "user", "content": SECRET + "<|im_end|>"}, ASSISTANT),
        "messages[0].content",
        "<|im_end|>",
    ),
    "tools are text": (row(USER, ASSISTANT, tools=SECRET), "tools", "not JSON"),
    "a call of nothing": (
        row(USER, {"role": "assistant", "tool_calls": [{}]}),
        "messages[1].tool_calls[0].function",
        "names no",
    ),
    "over-long": (
        row(USER, {"role": "assistant", "content": f"{SECRET} " * 200}),
        "",
        "more than data.sequenceLength, 128",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_line_and_field(tmp_path: Path, model: Path, name: str) -> None:
    line, field, says = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    error = fails(DataError, tmp_path, model)
    assert error.where == "rows.jsonl:4" + (f": {field}" if field else "")
    assert says in error.what


# Name: file name, its bytes, where, and a part of what is said.
BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("rows.jsonl", b"", "rows.jsonl", "empty"),
    "only blank lines": ("rows.jsonl", b"\n \n", "rows.jsonl", "no rows"),
    "BOM of UTF-8": ("rows.jsonl", b"\xef\xbb\xbf" + GOOD, "rows.jsonl:1", "byte order mark of UTF-8"),
    "BOM of UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16"), "rows.jsonl:1", "byte order mark of UTF-16"),
    "a JSON array": ("rows.jsonl", json.dumps(chats(2)).encode(), "rows.jsonl:1", "not an object"),
    "not gzip": ("rows.jsonl.gz", GOOD, "rows.jsonl.gz", "not whole gzip"),
    "gzip cut off": ("rows.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "rows.jsonl.gz", "not whole gzip"),
    "not zstd": ("rows.jsonl.zst", GOOD, "rows.jsonl.zst", "not whole zstd"),
    "not Parquet": ("rows.parquet", GOOD, "rows.parquet", "not whole parquet"),
    "unknown kind": ("rows.txt", GOOD, "rows.txt", "no kind that can be read"),
    "CSV with a cell too many": ("rows.csv", b"text\nfine\na,b\n", "rows.csv:3", "2 cells and the header 1"),
    "CSV with a column twice": ("rows.csv", b"text,text\na,b\n", "rows.csv:1", "name of another"),
    "CSV with a quote left open": ("rows.csv", b'text\n"a\nb\n', "rows.csv:3", "not CSV"),
    "CSV in another encoding": ("rows.csv", "text\né\n".encode("latin-1"), "rows.csv:2", "byte 1 of the line"),
    "CSV with an empty cell": ("rows.csv", b"text,more\nfine,1\n,2\n", "rows.csv:3: text", "empty"),
    "CSV without rows": ("rows.csv", b"text\n", "rows.csv", "no rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, model: Path, name: str) -> None:
    file, content, where, says = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    error = fails(DataError, tmp_path, model, data={"train": [{"uri": file}]})
    assert (error.where, says in error.what) == (where, True), error


def test_a_line_without_end_stops_at_the_bound(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LARGEST_ROW", 1 << 20)
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b'{"text": "' + b"a" * (3 << 20))
    error = fails(DataError, tmp_path, model)
    assert (error.where, error.what) == ("rows.jsonl:4", "the line is longer than 1 MiB")


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path, model: Path) -> None:
    pq.write_table(pa.table({"text": ["fine", None, "fine"]}), tmp_path / "rows.parquet")
    error = fails(DataError, tmp_path, model, data={"train": [{"uri": "rows.parquet"}]})
    assert (error.where, error.what) == ("rows.parquet:2: text", "the field is null")


def test_every_problem_is_told_at_once(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"{}\n" * 2 + GOOD + b"[]\n")
    error = fails(DataError, tmp_path, model)
    assert [place for place in ("rows.jsonl:4", "rows.jsonl:5", "rows.jsonl:9") if place in error.what] == [
        "rows.jsonl:4",
        "rows.jsonl:5",
        "rows.jsonl:9",
    ]


def test_a_hopeless_file_is_given_up_after_twenty_problems(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * 1000)
    assert "at least 20 problems" in fails(DataError, tmp_path, model).what


def test_a_column_that_is_not_there_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"question,answer\na,b\n")
    columns = {"prompt": "question", "completion": "reply"}
    error = fails(DataError, tmp_path, model, data={"train": [{"uri": "rows.csv", "columns": columns}]})
    assert error.where == "rows.csv:2: reply"


def test_a_held_out_prompt_in_the_training_rows_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + jsonl([chat("what's YOUR name", "Sharon.")]))
    prompts = [{"prompt": "Who?", "heldOut": True}, {"prompt": "What's your name?", "heldOut": True}]
    error = fails(DataError, tmp_path, model, evaluation={"prompts": prompts})
    assert error.where == "rows.jsonl:4"
    assert "spec.evaluation.prompts[1]" in error.what


def _link(folder: Path) -> str:
    (folder / "job").mkdir()
    (folder / "outside.jsonl").write_bytes(GOOD)
    (folder / "job" / "rows.jsonl").symlink_to(folder / "outside.jsonl")
    return "rows.jsonl"


def _folder_with_link(folder: Path) -> str:
    (folder / "job" / "data").mkdir(parents=True)
    (folder / "outside.jsonl").write_bytes(GOOD)
    (folder / "job" / "data" / "rows.jsonl").symlink_to(folder / "outside.jsonl")
    return "data"


def _parent(folder: Path) -> str:
    (folder / "job").mkdir()
    (folder / "rows.jsonl").write_bytes(GOOD)
    return "../rows.jsonl"


@pytest.mark.parametrize("lead_out", [_link, _folder_with_link, _parent])
def test_a_data_path_that_leaves_its_root_is_refused(
    tmp_path: Path, model: Path, lead_out: Callable[[Path], str]
) -> None:
    uri = lead_out(tmp_path)
    error = fails(SpecError, tmp_path / "job", model, data={"train": [{"uri": uri}]})
    assert error.where == "spec.data.train[0].uri"
    assert "leaves the job file's folder" in error.what


def test_a_file_that_is_not_there_is_named(tmp_path: Path, model: Path) -> None:
    assert fails(StorageError, tmp_path, model).where == "rows.jsonl"


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"data": {"evaluation": [{"uri": "rows.jsonl", "weight": 2}]}}, "spec.data.evaluation[0].weight"),
        ({"data": {"sequenceLength": 4096}}, "spec.data.sequenceLength"),
        ({"data": {"train": [{"uri": "s3://key:secret@bucket/rows.jsonl"}]}}, "spec.data.train[0].uri"),
        ({"data": {"train": [{"uri": "http://host/rows.jsonl"}]}}, "spec.data.train[0].uri"),
    ],
)
def test_what_cannot_be_prepared_is_named_by_field(
    tmp_path: Path, model: Path, spec: dict[str, Any], where: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    error = fails(SpecError, tmp_path, model, **spec)
    assert error.where == where
    assert "secret" not in str(error)


def _drop(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _write(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_drop("config.json"), "no config.json"),
    "config is not JSON": (_write("config.json", "{"), "not a JSON object"),
    "no tokenizer": (_drop("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "damaged tokenizer": (_write("tokenizer.json", "{}"), "does not load"),
    "no chat template": (_drop("chat_template.jinja"), "no chat template"),
    "a chat template that fails": (_write("chat_template.jinja", "{{ raise_exception('no') }}"), "refuses a question"),
    "a chat template without answers": (_write("chat_template.jinja", "{{ eos_token }}"), "leaves answers out"),
    "a chat template that is no template": (_write("chat_template.jinja", "{% if %}"), "refuses a question"),
    "no weights": (_drop("model.safetensors"), "no weights"),
    "pickle weights": (_pickle, "pickles (pytorch_model.bin)"),
    "a shard is missing": (_write("model.safetensors.index.json", INDEX), "model-00001-of-00002.safetensors"),
    "code of its own": (_own_code, "never run"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_folder_is_refused(tmp_path: Path, name: str) -> None:
    damage, says = BAD_MODELS[name]
    model = tiny_llama(tmp_path / "model")
    damage(model)
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    error = fails(ModelError, tmp_path, model)
    assert says in error.what
    assert str(model) in error.where
