"""The prepare stage as a whole: whatever the files' form, the same rows give the same shards."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.errors import DataError, Interrupted, StorageError
from finetune_api.run import PREPARED
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.prepare import prepare
from finetune_trainer.tokenizer import load_tokenizer
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chat, chats, jsonl, run_config

COMPLETIONS = [{"prompt": f"{i} times two, please?", "completion": f"It is {2 * i}, or so."} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def _csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=7)
    return out.getvalue()


FORMS = {
    "rows.jsonl": jsonl(COMPLETIONS),
    "rows.jsonl.gz": gzip.compress(jsonl(COMPLETIONS[:20])) + gzip.compress(jsonl(COMPLETIONS[20:])),
    "rows.jsonl.zst": pa.compress(jsonl(COMPLETIONS), "zstd", asbytes=True),
    "rows.csv": _csv(COMPLETIONS),
    "rows.csv.gz": gzip.compress(_csv(COMPLETIONS)),
    "rows.parquet": _parquet(COMPLETIONS),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_the_same_in_every_form(tmp_path: Path, model: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(COMPLETIONS))
    expected = Prepared(run_config(tmp_path, model)).documents()
    (tmp_path / name).write_bytes(FORMS[name])
    found = Prepared(run_config(tmp_path, model, {"train": [{"uri": name}]}, work="other"))
    assert found.documents() == expected
    assert len(expected) == 40
    assert found.manifest.sources[0].format == "completion"


def test_chats_with_tools_come_through_parquet(tmp_path: Path, model: Path) -> None:
    rows = [row | {"id": i} for i, row in enumerate(chats(10))]
    rows[3]["messages"] = [
        *rows[3]["messages"],
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "rows.parquet").write_bytes(_parquet(rows))
    expected = Prepared(run_config(tmp_path, model)).documents()
    parquet = run_config(tmp_path, model, {"train": [{"uri": "rows.parquet"}]}, work="other")
    assert Prepared(parquet).documents() == expected


def test_a_folder_is_its_files_in_order(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "rows" / "more"
    folder.mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_bytes(jsonl(COMPLETIONS[:10]))
    (folder / "b.csv").write_bytes(_csv(COMPLETIONS[10:]))
    (tmp_path / "rows" / "_SUCCESS").write_bytes(b"")
    prepared = Prepared(run_config(tmp_path, model, {"train": [{"uri": "rows"}]}))
    assert [source.uri for source in prepared.manifest.sources] == ["rows/a.jsonl", "rows/more/b.csv"]
    assert prepared.manifest.splits.train.documents == 40


def test_columns_are_renamed(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(COMPLETIONS))
    renamed = [{"text": "x", "question": row["prompt"], "answer": row["completion"]} for row in COMPLETIONS]
    (tmp_path / "renamed.csv").write_bytes(_csv(renamed))
    columns = {"prompt": "question", "completion": "answer"}
    source = {"uri": "renamed.csv", "columns": columns, "format": "completion"}
    expected = Prepared(run_config(tmp_path, model)).documents()
    assert Prepared(run_config(tmp_path, model, {"train": [source]}, work="other")).documents() == expected


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path, model: Path) -> None:
    rows = [chat(f"Question {i}: " + "word " * (i % 30), f"Answer {i}: " + "more " * (i % 17)) for i in range(12_000)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([*rows, *rows[:100]]))
    data = {"evaluationFraction": 0.1, "sequenceLength": 256}
    here = Prepared(run_config(tmp_path, model, data), workers=0)
    there = Prepared(run_config(tmp_path, model, data, work="other"), workers=2)
    assert there.files() == here.files()
    assert here.report["duplicates"]["exact"] == 100


def test_equal_input_is_prepared_once(tmp_path: Path, model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(chats(5)))
    run = run_config(tmp_path, model)
    first = prepare(run, workers=0)
    manifest = tmp_path / "work" / PREPARED / "manifest.json"
    written = manifest.stat().st_mtime_ns
    os.utime(rows)
    assert prepare(run, workers=0) == first
    assert manifest.stat().st_mtime_ns == written
    rows.write_bytes(jsonl(chats(6)))
    assert prepare(run, workers=0).key != first.key
    assert manifest.stat().st_mtime_ns != written


def test_a_damaged_shard_is_made_again(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(5)))
    prepared = Prepared(run_config(tmp_path, model))
    before = prepared.files()
    shard = prepared.folder / "train-00000.arrow"
    shard.write_bytes(before["train-00000.arrow"][:-8])
    with pytest.raises(StorageError, match="changed since it was written"):
        PackedDataset(prepared.folder, "train")
    assert Prepared(run_config(tmp_path, model)).files() == before


def test_the_manifest_has_the_hashes_of_the_shards_and_sources(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(50)))
    prepared = Prepared(run_config(tmp_path, model, {"evaluationFraction": 0.2}))
    splits = prepared.manifest.splits
    for shard in [*splits.train.shards, *splits.evaluation.shards]:
        content = (prepared.folder / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    source = prepared.manifest.sources[0]
    assert source.sha256 == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert splits.train.documents + splits.evaluation.documents == source.rows == 50
    for split in ("train", "evaluation"):
        data, facts = PackedDataset(prepared.folder, split), prepared.manifest.split(split)
        assert len(data) == facts.sequences
        assert data.lengths.sum() == facts.tokens
        assert data.documents.sum() == facts.documents
        assert data.targets.sum() == facts.target_tokens


def test_an_interrupted_run_leaves_nothing_that_counts(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(5)))

    def stop(done: float, total: float, what: str) -> None:
        if what.startswith("pack"):
            raise Interrupted("stopped")

    run = run_config(tmp_path, model)
    with pytest.raises(Interrupted):
        prepare(run, stop, workers=0)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_killed_run_leaves_no_workers_and_the_next_begins_again(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(50_000)))
    run = run_config(tmp_path, model)
    (tmp_path / "run.json").write_text(run.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from finetune_api.run import RunConfig; "
        "from finetune_trainer.prepare import prepare\n"
        "prepare(RunConfig.model_validate_json(Path(sys.argv[1]).read_bytes()), workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run.json"])
    spilled = tmp_path / "work" / "prepared.partial" / "spill" / "ids"
    _wait(lambda: spilled.exists() and spilled.stat().st_size > 0)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    _wait(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not (tmp_path / "work" / PREPARED).exists()
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(5)))
    assert Prepared(run).manifest.splits.train.documents == 5
    assert [path.name for path in (tmp_path / "work").iterdir()] == [PREPARED]


def _wait(done: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def test_evaluation_rows_are_chosen_by_content(tmp_path: Path, model: Path) -> None:
    rows = chats(200)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    first = Prepared(run_config(tmp_path, model, {"evaluationFraction": 0.2}))
    assert 20 <= first.manifest.splits.evaluation.documents <= 60
    (tmp_path / "rows.jsonl").write_bytes(jsonl(reversed(rows)))
    second = Prepared(run_config(tmp_path, model, {"evaluationFraction": 0.2}, work="other"))
    assert second.documents("evaluation") == first.documents("evaluation")
    assert second.documents("train") == first.documents("train")


def test_a_small_fraction_of_few_rows_still_gives_one_evaluation_row(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(5)))
    prepared = Prepared(run_config(tmp_path, model, {"evaluationFraction": 0.001}))
    assert (len(prepared.documents("train")), len(prepared.documents("evaluation"))) == (4, 1)


def test_a_training_row_that_evaluation_has_is_dropped_and_reported(tmp_path: Path, model: Path) -> None:
    rows = chats(20)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "evaluation.jsonl").write_bytes(jsonl([chat("New?", "Yes, new."), rows[7]]))
    prepared = Prepared(run_config(tmp_path, model, {"evaluation": [{"uri": "evaluation.jsonl"}]}))
    assert (len(prepared.documents("train")), len(prepared.documents("evaluation"))) == (19, 2)
    assert prepared.report["duplicates"] == {"exact": 0, "near": 0, "evaluationLeaks": 1}
    assert prepared.report["duplicateRows"] == [
        {"row": "rows.jsonl:8", "repeats": "evaluation.jsonl:2", "kind": "leak"}
    ]


def test_near_duplicates_are_dropped_and_reported_but_not_a_shared_system_message(tmp_path: Path, model: Path) -> None:
    system = {"role": "system", "content": " ".join(f"rule {i}" for i in range(40))}
    rows = [{"messages": [system, *row["messages"]]} for row in chats(10)]
    long = " ".join(f"word{i}" for i in range(60))
    rows += [chat(long, "Yes. " + long), chat(long, "Yes. " + long + " indeed")]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    prepared = Prepared(run_config(tmp_path, model, {"sequenceLength": 1024}))
    assert prepared.report["duplicateRows"] == [{"row": "rows.jsonl:12", "repeats": "rows.jsonl:11", "kind": "near"}]
    assert len(prepared.documents()) == 11
    kept = Prepared(run_config(tmp_path, model, {"sequenceLength": 1024, "deduplicate": "exact"}, work="other"))
    assert len(kept.documents()) == 12


def test_data_that_is_all_dropped_is_an_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(5)))
    run = run_config(tmp_path, model, {"evaluation": [{"uri": "rows.jsonl"}]})
    with pytest.raises(DataError, match="no row is left to train on"):
        prepare(run, workers=0)


@pytest.mark.parametrize(("weight", "fewest", "most"), [(0.5, 70, 130), (1, 200, 200), (2.5, 470, 530)])
def test_a_sources_weight_is_how_often_its_rows_are_seen(
    tmp_path: Path, model: Path, weight: float, fewest: int, most: int
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(200)))
    documents = Prepared(run_config(tmp_path, model, {"train": [{"uri": "rows.jsonl", "weight": weight}]})).documents()
    assert fewest <= len(documents) <= most
    times = {documents.count(document) for document in documents}
    assert times <= {int(weight), int(weight) + 1}


LONG = jsonl([chat("Count!", " ".join(str(i) for i in range(200))), chat("Short?", "Yes.")])


@pytest.mark.parametrize(
    ("overlong", "lengths", "reported"),
    [
        ("truncate", [128], {"truncated": 1}),
        ("split", [128, 128, 128, 128], {"split": 1}),
        ("drop", [], {"dropped": 1}),
    ],
)
def test_overlong_rows_become_what_was_asked_and_are_counted(
    tmp_path: Path, model: Path, overlong: str, lengths: list[int], reported: dict[str, int]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LONG)
    prepared = Prepared(run_config(tmp_path, model, {"overlong": overlong}))
    documents = prepared.documents()
    whole = max(row["tokens"] for row in prepared.report["longest"])
    full = [len(document) for document in documents if len(document) == 128]
    assert full == lengths
    for kind in ("truncated", "split", "dropped"):
        assert prepared.report["overlong"][kind]["rows"] == reported.get(kind, 0)
    if overlong == "truncate":
        assert prepared.report["overlong"]["truncated"]["tokens"] == whole - 128
    if overlong == "split":
        assert sum(map(len, documents)) == prepared.report["tokens"]
    data = PackedDataset(prepared.folder, "train")
    for index in range(len(data)):
        sequence = data[index]
        starts = sequence.documents.cumsum() - sequence.documents
        assert not sequence.weights[starts].any(), "a document's first token follows nothing"


def test_a_row_whose_answer_is_cut_off_is_counted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl([chat("word " * 200, "Answer."), chat("Short?", "Yes.")]))
    prepared = Prepared(run_config(tmp_path, model, {"overlong": "truncate"}))
    assert prepared.report["overlong"]["nothingToLearn"] == {"documents": 1, "tokens": 128}
    assert len(prepared.documents()) == 1


def test_without_packing_each_document_is_a_sequence(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(20)))
    packed = Prepared(run_config(tmp_path, model))
    apart = Prepared(run_config(tmp_path, model, {"packing": False}, work="other"))
    assert apart.manifest.splits.train.sequences == 20 > packed.manifest.splits.train.sequences
    assert apart.documents() == packed.documents()
    assert apart.manifest.splits.train.target_tokens == packed.manifest.splits.train.target_tokens


def test_reports_carry_positions_but_no_text(tmp_path: Path, model: Path) -> None:
    secret = "quetzalcoatl"
    (tmp_path / "rows.jsonl").write_bytes(jsonl([chat(secret, secret + str(i // 2)) for i in range(10)]))
    prepared = Prepared(run_config(tmp_path, model))
    for name in ("manifest.json", "data-report.json"):
        assert secret.encode() not in prepared.files()[name]
    assert prepared.report["longest"][0]["row"] == "rows.jsonl:1"
    assert sum(bucket["rows"] for bucket in prepared.report["lengths"]) == 10
    assert prepared.report["splits"]["train"]["maskedShare"] > 0


def test_the_tokenizers_facts_are_in_the_manifest(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(2)))
    facts = Prepared(run_config(tmp_path, model)).manifest.tokenizer
    tokenizer = load_tokenizer(model)
    assert facts.end_of_turn_token_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert facts.vocabulary_size == len(tokenizer)
