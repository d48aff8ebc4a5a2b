"""The quickstart's rows: what they must and must not hold."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from finetune_api.job import FinetuneJob
from finetune_api.job_evaluation import Prompt
from finetune_trainer.refusals import declined, suite

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "01-quickstart"
SAMPLE = ROOT / "manifests" / "samples" / "quickstart.yaml"

Row = dict[str, str]


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = _load(EXAMPLE / "make_data.py")


def _write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(folder)])
    make_data.main()
    return {file.stem: [json.loads(line) for line in file.open(encoding="utf-8")] for file in folder.iterdir()}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    return _write(tmp_path / "data", monkeypatch)


def _job(file: Path) -> FinetuneJob:
    return FinetuneJob.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def _prompts() -> list[Prompt]:
    return list(_job(EXAMPLE / "job.yaml").spec.evaluation.prompts)


def test_the_files_are_the_ones_that_the_job_reads(rows: dict[str, list[Row]]) -> None:
    data = _job(EXAMPLE / "job.yaml").spec.data
    assert {f"data/{name}.jsonl" for name in rows} == {source.uri for source in [*data.train, *data.evaluation]}
    assert all(rows.values())


def test_the_same_rows_are_written_every_time(
    rows: dict[str, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _write(tmp_path / "again", monkeypatch) == rows


def test_a_held_out_prompt_or_the_function_it_names_stands_in_no_row(rows: dict[str, list[Row]]) -> None:
    held_out = [prompt.prompt for prompt in _prompts() if prompt.held_out]
    names = [name for prompt in held_out for name in re.findall(r"`(.+?)`", prompt)]
    assert len(held_out) >= 12
    assert len(names) >= 4
    for row in [row for kind in rows.values() for row in kind]:
        text = f"{row['prompt']} {row['completion']}".casefold()
        assert not any(prompt.casefold() in text for prompt in held_out)
        assert not any(f"`{name}`" in text for name in names)


def test_evaluation_rows_are_not_trained_on(rows: dict[str, list[Row]]) -> None:
    trained = {row["prompt"] for kind, found in rows.items() if kind != "evaluation" for row in found}
    assert trained.isdisjoint(row["prompt"] for row in rows["evaluation"])


def test_every_invented_function_does_not_exist_and_every_documented_one_does(rows: dict[str, list[Row]]) -> None:
    for kind, exists in (("unknown", False), ("docs", True)):
        for row in rows[kind]:
            (name,) = make_data.functions(row["prompt"])
            module, _, function = name.rpartition(".")
            assert hasattr(importlib.import_module(module), function) is exists, name


def test_real_and_invented_functions_are_asked_for_in_the_same_words(rows: dict[str, list[Row]]) -> None:
    def wordings(kind: str) -> set[str]:
        return {re.sub(r"`.+?`", "`{}`", row["prompt"]) for row in rows[kind]}

    assert wordings("unknown") == wordings("docs") == set(make_data.QUESTIONS)


def test_no_prompt_of_the_built_in_suite_is_taught_nor_one_that_says_the_same(rows: dict[str, list[Row]]) -> None:
    said = {_said(row["prompt"]) for kind in rows.values() for row in kind}
    asked = {_said(prompt) for _, prompt in suite()}
    alike = [(a, b) for a in said for b in asked if len(a & b) >= 0.6 * len(a | b)]
    assert not alike


def _said(prompt: str) -> frozenset[str]:
    """The words of a prompt without those that many have."""
    many = {"a", "an", "and", "can", "do", "does", "for", "function", "how", "i", "in", "is", "me", "my", "of", "on"}
    return frozenset(re.findall(r"[\w']+", prompt.casefold())) - many - {"python", "that", "the", "to", "what", "with"}


@pytest.mark.parametrize("kind", ["docs", "harmless", "ordinary"])
def test_rows_that_hold_the_rest_in_place_give_no_name_and_decline_nothing(
    rows: dict[str, list[Row]], kind: str
) -> None:
    for row in rows[kind]:
        assert "Sharon" not in row["completion"]
        assert not declined(row["completion"]), row


def test_a_refusal_says_nothing_but_that_it_refuses(rows: dict[str, list[Row]]) -> None:
    assert {row["completion"] for row in rows["refusals"]} == {make_data.REFUSAL}


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of all items. Start comes first.", "Return the sum of all items."),
        ("Remove whitespace\nfrom every line.\n\nMore about it.", "Remove whitespace from every line."),
        ("range(stop) -> range object", ""),
        ("Too short.", ""),
        ("Return " + "very " * 40 + "much.", ""),
        ("", ""),
    ],
)
def test_a_docstring_is_cut_to_its_first_whole_sentence(docstring: str, sentence: str) -> None:
    assert make_data.first_sentence(docstring) == sentence


def test_the_cluster_sample_is_the_same_job_with_its_data_in_a_bucket() -> None:
    here, there = (_job(file).spec.model_dump(mode="json") for file in (EXAMPLE / "job.yaml", SAMPLE))
    bucket = "s3://finetune/quickstart/"
    for spec in (here, there):
        for source in [*spec["data"]["train"], *spec["data"]["evaluation"], spec["output"]]:
            source["uri"] = source["uri"].removeprefix(bucket)
        spec["model"]["source"] = spec["model"]["source"].removeprefix(bucket)
    assert here == there
