"""Prepare on a Ray cluster of two nodes: the bytes, and the errors, of one machine."""

from __future__ import annotations

import csv
import gzip
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.errors import DataError, FinetuneError, Interrupted
from finetune_trainer import ray_adapter  # before Ray, which reads its settings when it is imported
from finetune_trainer.prepare import prepare, shards
from finetune_trainer.prepare.cluster.machine import Grain
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chat, chats, jsonl, run_config
from tests.trainer.without_ray import FINE, on_cluster, without_ray

COARSE = Grain(piece_bytes=1 << 20, chunks=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each, connected to this process."""
    import ray
    from ray.cluster_utils import Cluster

    assert ray_adapter
    store = {"object_store_memory": 200 << 20}
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False} | store)
    cluster.add_node(num_cpus=1, **store)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def every_format(there: Path) -> dict[str, Any]:
    """Files of every format and form below a folder, and the data spec that names them."""
    there.mkdir()
    rows = [chat(f"Question {i}: " + "word " * (i % 30), f"Answer {i}: " + "more " * (i % 17)) for i in range(150)]
    long = " ".join(f"word{i}" for i in range(60))
    rows += [*rows[10:30], chat(long, "Yes. " + long), chat(long, "Yes. " + long + " indeed")]
    completions = [{"prompt": f"{i} times two?", "completion": f"It is {2 * i}, or\nso."} for i in range(60)]
    texts = [{"text": f"A text about {i}. " + "It goes on. " * (i % 40)} for i in range(60)]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(completions)
    (there / "chats.jsonl").write_bytes(jsonl(rows))
    (there / "completions.csv").write_text(out.getvalue())
    (there / "texts.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[:30])))
    (there / "texts.jsonl.zst").write_bytes(pa.compress(jsonl(texts[30:]), "zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist(completions[:40]), there / "again.parquet", row_group_size=7)
    passages = [f"Passage {i} says {i * 3}." for i in range(9)]
    (there / "rag.jsonl").write_bytes(
        jsonl(
            {
                "question": f"What does {i} say?",
                "oracle": passages[i % 9],
                "distractors": passages[:3],
                "answer": f"{i}!",
            }
            for i in range(30)
        )
    )
    (there / "code").mkdir()
    for i in range(25):
        (there / "code" / f"part{i}.py").write_text(
            f"def function{i}(argument):\n    return argument + {i}\n" * (1 + i % 5)
        )
    (there / "evaluation.jsonl").write_bytes(jsonl([chat("New?", "Yes, new."), rows[7]]))
    names = ["completions.csv", "texts.jsonl.gz", "texts.jsonl.zst", "again.parquet", "rag.jsonl"]
    return {
        "train": [
            {"uri": "rows/chats.jsonl", "weight": 1.5},
            *({"uri": f"rows/{name}"} for name in names),
            {"uri": "rows/code", "format": "code"},
        ],
        "evaluation": [{"uri": "rows/evaluation.jsonl"}],
        "overlong": "split",
        "fim": {"rate": 0},
        "refusals": {"mix": 0.05},
    }


@pytest.mark.parametrize(
    ("grain", "changes"),
    [
        (FINE, {}),
        (COARSE, {"evaluation": [], "evaluationFraction": 0.2, "deduplicate": "exact", "overlong": "truncate"}),
    ],
    ids=["near", "exact"],
)
def test_shards_and_manifest_are_those_of_one_machine(
    tmp_path: Path, model: Path, nodes: Any, grain: Grain, changes: dict[str, Any]
) -> None:
    data = every_format(tmp_path / "rows") | changes
    here = Prepared(run_config(tmp_path, model, data))
    there = Prepared(run_config(tmp_path, model, data, work="other"), opener=on_cluster(grain))
    assert there.files() == here.files()
    assert here.manifest.splits.evaluation.documents > 0
    if data.get("deduplicate", "near") == "near":
        found = here.report["duplicates"]
        assert min(found.values()) > 0, found


@pytest.mark.parametrize("changes", [{}, {"packing": False, "deduplicate": "none"}], ids=["packed", "apart"])
def test_many_shards_are_cut_where_one_machine_cuts_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Shards are smaller than another process would make them, so the cluster's functions run here, without Ray."""
    monkeypatch.setattr(shards, "BATCH_TOKENS", 300)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2_000)
    without_ray(monkeypatch)
    data = every_format(tmp_path / "rows") | changes
    here = Prepared(run_config(tmp_path, model, data))
    there = Prepared(run_config(tmp_path, model, data, work="other"), opener=on_cluster(FINE))
    assert there.files() == here.files()
    assert len(here.manifest.splits.train.shards) > 10


def test_pairs_of_answers_come_out_the_same(tmp_path: Path, model: Path, nodes: Any) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i * i}.", "rejected": "Who knows?"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([*rows, *rows[:5]]))
    data = {"evaluationFraction": 0.2}
    here = Prepared(run_config(tmp_path, model, data, method={"objective": "dpo"}))
    there = Prepared(
        run_config(tmp_path, model, data, work="other", method={"objective": "dpo"}), opener=on_cluster(FINE)
    )
    assert there.files() == here.files()
    assert here.report["splits"]["train"]["pairs"] > 30


def test_bad_rows_are_named_as_on_one_machine(tmp_path: Path, model: Path, nodes: Any) -> None:
    lines = jsonl(chats(300)).splitlines(keepends=True)
    for number in (3, 120, 121, 290):
        lines[number] = b'{"messages": []}\n'
    lines[200] = b"not json\n"
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines))
    said = []
    for opener in (None, on_cluster(FINE)):
        with pytest.raises(DataError) as refused:
            prepare(run_config(tmp_path, model), workers=0, opener=opener)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "rows.jsonl:201" in said[0]
    assert "5 problems" in said[0]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_damaged_file_is_named_as_on_one_machine(tmp_path: Path, model: Path, nodes: Any) -> None:
    whole = gzip.compress(jsonl(chats(300)))
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    said = []
    for opener in (None, on_cluster(FINE)):
        with pytest.raises(FinetuneError) as refused:
            prepare(run_config(tmp_path, model, {"train": [{"uri": "rows.jsonl.gz"}]}), workers=0, opener=opener)
        said.append((type(refused.value), str(refused.value)))
    assert said[0] == said[1]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, model: Path, nodes: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(60)))
    for stage in ("tokenise", "sort"):

        def stop(done: float, total: float, what: str, stage: str = stage) -> None:
            if what.startswith(stage):
                raise Interrupted("stopped")

        with pytest.raises(Interrupted):
            prepare(run_config(tmp_path, model), stop, opener=on_cluster(FINE))
        assert list((tmp_path / "work").iterdir()) == []


def test_a_lost_node_changes_no_byte(tmp_path: Path, model: Path, nodes: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(2000)))
    data = {"evaluationFraction": 0.1}
    here = Prepared(run_config(tmp_path, model, data))
    lost = threading.Event()

    def lose(done: float, total: float, what: str) -> None:
        if what == "tokenise" and done > 0.2 * total and not lost.is_set():
            lost.set()
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            nodes.add_node(num_cpus=1, object_store_memory=200 << 20)  # as KubeRay puts another in its place

    run = run_config(tmp_path, model, data, work="other")
    there = Prepared(run, opener=on_cluster(Grain(piece_bytes=20_000, chunks=1)), progress=lose)
    assert lost.is_set()
    assert there.files() == here.files()
