"""Code becomes documents: files of a repository in order, some with their middle taken out, only what was asked for.

The transformation is written here once more, from the paper's description and the documented draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_api.errors import DataError, FinetuneError, ModelError
from finetune_trainer.dataset import PackedDataset
from tests.tiny import END, tiny_llama, tiny_tokenizer
from tests.trainer.jobs import Prepared, jsonl, run_config

PREFIX, SUFFIX, MIDDLE, FILE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"


def coder(folder: Path, *tokens: str) -> Path:
    """A tiny model with these tokens; as in published models, they are added but not called special."""
    model = tiny_llama(folder, vocabulary=512)
    tiny_tokenizer(model, vocabulary=500)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coder(tmp_path_factory.mktemp("model") / "coder", PREFIX, SUFFIX, MIDDLE)


def functions(count: int) -> list[str]:
    """Files of code, no two alike, with characters that take several bytes and tokens."""
    comments = [f"# {'naïve → ' * (i % 3)}step {i * i}" for i in range(count)]
    return [
        f"def f{i}(x):\n    {comment}\n    return x * {i} + {i * 7}\n\n\nprint(f{i}({i * 13}))\n"
        for i, comment in enumerate(comments)
    ]


def prepare_code(folder: Path, model: Path, texts: list[str], work: str = "work", **data: Any) -> Prepared:
    (folder / "rows.jsonl").write_bytes(jsonl({"text": text} for text in texts))
    source = {"uri": "rows.jsonl", "format": "code"}
    seed = data.pop("seed", 0)
    data = {"train": [source], "sequenceLength": 256, "deduplicate": "exact"} | data
    return Prepared(run_config(folder, model, data, work=work, training={"seed": seed}))


def documents(prepared: Prepared, model: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(ids) for ids in prepared.documents()]


def reference(text: str, rate: float, spm_rate: float, seed: int) -> str:
    """The written document: four numbers from the seed and the text's hash say whether, in which order, and where."""
    row = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    digest = hashlib.blake2b(f"fim {seed} {row} 0".encode(), digest_size=32).digest()
    numbers = [(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(4)]
    if numbers[0] >= rate:
        return text + END
    cuts = [int(number * (len(text) + 1)) for number in numbers[2:]]
    low, high = min(cuts), max(cuts)
    before, between, after = text[:low], text[low:high], text[high:]
    if numbers[1] < spm_rate:
        return PREFIX + SUFFIX + after + MIDDLE + before + between + END
    return PREFIX + before + SUFFIX + after + MIDDLE + between + END


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.0, 0.5), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_middles_are_taken_out_as_in_the_reference(tmp_path: Path, model: Path, rate: float, spm_rate: float) -> None:
    texts = functions(200)
    prepared = prepare_code(tmp_path, model, texts, fim={"rate": rate, "spmRate": spm_rate}, seed=3)
    written = documents(prepared, model)
    assert sorted(written) == sorted(reference(text, rate, spm_rate, 3) for text in texts)
    turned = sum(PREFIX in text for text in written)
    spm = sum(text.startswith(PREFIX + SUFFIX) for text in written)
    assert abs(turned - rate * 200) <= 30
    assert abs(spm - rate * spm_rate * 200) <= 30


def test_whoever_reads_the_parts_in_order_has_the_file(tmp_path: Path, model: Path) -> None:
    texts = functions(40)
    whole = []
    for text in documents(prepare_code(tmp_path, model, texts, fim={"rate": 1, "spmRate": 0.5}), model):
        before, rest = text.removesuffix(END).split(SUFFIX)
        after, between = rest.split(MIDDLE)
        whole.append(before.removeprefix(PREFIX) + between + after if before != PREFIX else between + after)
    assert sorted(whole) == sorted(texts)


def test_what_an_editor_gives_is_not_learned_and_everything_else_is(tmp_path: Path, model: Path) -> None:
    prepared = prepare_code(tmp_path, model, functions(20), fim={"rate": 1, "spmRate": 0.5}, packing=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    given = set(tokenizer.convert_tokens_to_ids([PREFIX, SUFFIX, MIDDLE]))
    data = PackedDataset(prepared.folder, "train")
    for index in range(len(data)):
        sequence = data[index]
        learned = [bool(weight) for weight in sequence.weights]
        assert learned == [token not in given for token in sequence.input_ids.tolist()]


def test_draws_depend_on_seed_and_row_and_nothing_else(tmp_path: Path, model: Path) -> None:
    texts = functions(30)
    first = prepare_code(tmp_path, model, texts, work="a", seed=1)
    again = prepare_code(tmp_path, model, texts[::-1], work="b", seed=1)
    other = prepare_code(tmp_path, model, texts, work="c", seed=2)
    assert first.documents() == again.documents() != other.documents()


def test_a_long_file_is_cut_before_its_middles_are_taken_out(tmp_path: Path, model: Path) -> None:
    text = "".join(functions(60))
    prepared = prepare_code(tmp_path, model, [text], fim={"rate": 0.6, "spmRate": 0.5}, overlong="split")
    written = documents(prepared, model)
    assert len(written) > 10
    for piece in written:
        assert piece.count(PREFIX) == piece.count(MIDDLE) <= 1
        assert piece.endswith(END) or PREFIX not in piece
    assert sum(piece.endswith(END) and PREFIX not in piece for piece in written) <= 1, "only the file's end has an end"
    assert sum(map(len, written)) - sum(len(mark) * piece.count(mark) for piece in written
                                        for mark in (PREFIX, SUFFIX, MIDDLE, END)) == len(text)  # fmt: skip
    assert prepared.report["overlong"]["split"]["rows"] == 1


def test_a_truncated_file_keeps_its_first_lines(tmp_path: Path, model: Path) -> None:
    text = "".join(functions(60))
    prepared = prepare_code(tmp_path, model, [text], fim={"rate": 0}, overlong="truncate")
    (written,) = documents(prepared, model)
    assert text.startswith(written)
    assert written.endswith("\n")
    truncated = prepared.report["overlong"]["truncated"]
    assert truncated["rows"] == 1
    assert truncated["tokens"] + len(prepared.documents()[0]) == pytest.approx(len(
        AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]), abs=2)  # fmt: skip


def test_a_tokenizer_without_the_tokens_is_refused_unless_no_middle_is_asked_for(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "plain")
    texts = functions(3)
    with pytest.raises(ModelError, match=r"no tokens for fill in the middle.*\n?.*data\.fim\.rate to 0"):
        prepare_code(tmp_path, model, texts)
    prepared = prepare_code(tmp_path, model, texts, fim={"rate": 0})
    assert sorted(documents(prepared, model)) == sorted(text + END for text in texts)


def write_tree(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


TREE: dict[str, str | bytes] = {
    "b/two.py": "# SPDX-License-Identifier: MIT\ntwo = 2\n",
    "a.py": "# SPDX-License-Identifier: Apache-2.0\none = 1\n",
    "b/three.go": "package three // SPDX-License-Identifier: MIT\n",
    "README.md": "# Numbers\n",
    "b/__init__.py": "",
    "c/old.py": b"name = '\xe9t\xe9'\n",
    "logo.png": b"\x89PNG",
    "rows.csv": "a,b\n1,2\n",
}


def prepare_tree(folder: Path, model: Path, files: Mapping[str, str | bytes] = TREE, **source: Any) -> Prepared:
    write_tree(folder / "repo", files)
    source = {"uri": "repo", "format": "code"} | source
    data = {"train": [source], "sequenceLength": 256, "deduplicate": "exact", "fim": {"rate": 0}}
    return Prepared(run_config(folder, model, data))


def test_a_folder_of_code_is_one_document_in_the_order_of_its_paths(tmp_path: Path, model: Path) -> None:
    prepared = prepare_tree(tmp_path, model)
    texts = [str(TREE[name]) + END for name in ("README.md", "a.py", "b/three.go", "b/two.py")]
    assert documents(prepared, model) == ["".join(texts)]
    assert prepared.report["leftOut"] == {
        "otherFiles": 2, "unreadable": 2, "language": 0, "license": 0, "controlToken": 0,
    }  # fmt: skip
    (source,) = prepared.manifest.sources
    assert (source.uri, source.format, source.rows) == ("repo", "code", 4)


def test_a_file_separator_tells_each_files_path(tmp_path: Path) -> None:
    model = coder(tmp_path / "coder", PREFIX, SUFFIX, MIDDLE, FILE)
    prepared = prepare_tree(tmp_path, model, {"b.py": "b = 2\n", "a/c.py": "c = 3\n"})
    assert documents(prepared, model) == [f"{FILE}a/c.py\nc = 3\n{END}{FILE}b.py\nb = 2\n{END}"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequence = PackedDataset(prepared.folder, "train")[0]
    learned = sequence.input_ids[sequence.weights > 0].tolist()
    assert tokenizer.decode(learned) == f"c = 3\n{END}b = 2\n{END}", "a path is given, not learned"


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ({"languages": ["python"]}, ["a.py", "b/two.py"]),
        ({"languages": ["Go", "markdown"]}, ["README.md", "b/three.go"]),
        ({"licenses": ["MIT"]}, ["b/three.go", "b/two.py"]),
        ({"languages": ["python"], "licenses": ["apache-2.0"]}, ["a.py"]),
    ],
)
def test_languages_and_licenses_filter(tmp_path: Path, model: Path, code: dict[str, Any], kept: list[str]) -> None:
    prepared = prepare_tree(tmp_path, model, code=code)
    assert documents(prepared, model) == ["".join(str(TREE[name]) + END for name in kept)]
    left = prepared.report["leftOut"]
    assert sum(left.values()) == len(TREE) - len(kept)
    write_tree(tmp_path, {"rows.jsonl": jsonl(
        {"text": text, "path": name, "repository": "r"} for name, text in TREE.items() if isinstance(text, str) and text
    )})  # fmt: skip
    source = {"uri": "rows.jsonl", "format": "code", "code": code}
    data = {"train": [source], "sequenceLength": 256, "fim": {"rate": 0}}
    rows = Prepared(run_config(tmp_path, model, data, work="rows"))
    assert documents(rows, model) == documents(prepared, model)


def test_repositories_do_not_mix_and_their_files_need_not_stand_together(tmp_path: Path, model: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"{repo}_{n} = {n}\n", "path": f"{n}.py", "repository": repo} for n in (2, 0, 1) for repo in "xy"
    ]
    rows.append({"text": "alone = 0\n", "path": "0.py", "repository": None})
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    source = {"uri": "rows.jsonl", "format": "code", "weight": 2}
    data = {"train": [source], "sequenceLength": 256, "fim": {"rate": 0}, "deduplicate": "none"}
    written = documents(Prepared(run_config(tmp_path, model, data)), model)
    each = ["".join(f"{repo}_{n} = {n}\n{END}" for n in range(3)) for repo in "xy"]
    assert sorted(written) == sorted([*each, f"alone = 0\n{END}"] * 2)


def test_a_repository_longer_than_a_sequence_goes_on_in_the_next_document(tmp_path: Path, model: Path) -> None:
    files = {f"{i:02}.py": text for i, text in enumerate(functions(30))}
    prepared = prepare_tree(tmp_path, model, files)
    written = documents(prepared, model)
    assert len(written) > 3
    assert sorted(part for text in written for part in text.split(END) if part) == sorted(files.values())
    for text in written:
        first = text.split(END)[0]
        start = list(files.values()).index(first)
        parts = text.removesuffix(END).split(END)
        assert parts == list(files.values())[start : start + len(parts)]
    longest = max(len(ids) for ids in prepared.documents())
    assert longest <= 256


def test_code_that_holds_control_tokens_is_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    texts = [*functions(3), f"stop = '{END}'\n", f"ask = '{MIDDLE}'\n"]
    prepared = prepare_code(tmp_path, model, texts, fim={"rate": 0})
    assert len(prepared.documents()) == 3
    assert prepared.report["leftOut"]["controlToken"] == 2


def test_a_folder_without_code_is_an_error_that_says_so(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match="no code in a language that is asked for"):
        prepare_tree(tmp_path, model, code={"languages": ["cobol"]})
    with pytest.raises(DataError, match="all of its code was left out"):
        prepare_tree(tmp_path, model, code={"licenses": ["WTFPL"]})


def test_rows_of_code_may_be_none_and_the_seed_makes_other_data(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl([{"path": "a.py"}]))
    with pytest.raises(FinetuneError, match="text"):
        Prepared(run_config(tmp_path, model, {"train": [{"uri": "rows.jsonl", "format": "code"}]}))
    one = prepare_code(tmp_path, model, functions(2), work="a", seed=1)
    two = prepare_code(tmp_path, model, functions(2), work="b", seed=2)
    assert one.manifest.key != two.manifest.key
