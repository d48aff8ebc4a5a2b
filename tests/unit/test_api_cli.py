"""The command line: exit codes, output for people and programs, and commands that load when they are asked for."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from finetune_api import cli
from finetune_api.errors import DataError, FinetuneError
from tests.unit import api_cases
from tests.unit.api_cases import changed


def finetune(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune_api", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(api_cases.JOB))
    return file


def test_a_valid_file_is_named_and_ends_with_0(job: Path) -> None:
    done = finetune("validate", str(job))
    assert (done.returncode, done.stdout, done.stderr) == (0, "support-chat: valid\n", "")


def test_errors_of_all_files_go_to_stderr_with_their_lines_and_end_with_2(job: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: finetune.dev/v1alpha1\nkind: FinetuneJob\nmetadata: {name: bad}\nspec: {}\n")
    done = finetune("validate", str(bad), str(job), str(tmp_path / "nowhere.yaml"))
    assert done.returncode == 2
    assert done.stdout == "support-chat: valid\n"
    assert f"{bad}:4: spec.output: is required\n  → Where weights and report go. It needs uri.\n" in done.stderr
    assert "nowhere.yaml:1: cannot be read: No such file or directory" in done.stderr
    assert done.stderr.endswith("4 errors\n")


def test_standard_input_is_read_and_json_says_the_same_for_programs() -> None:
    bad = yaml.safe_dump(changed(api_cases.JOB, {"spec.workers.min": 4}))
    done = finetune("validate", "-", "--output", "json", stdin=bad)
    assert done.returncode == 2
    (file,) = json.loads(done.stdout)
    assert (file["file"], file["valid"]) == ("<stdin>", False)
    (problem,) = file["documents"][0]["problems"]
    assert problem == {
        "line": 14,
        "column": 5,
        "field": "spec.workers.min",
        "message": "workers.min is more than workers.count",
        "got": "4",
        "hint": "lower min or raise count",
    }


def test_crd_prints_both_crds() -> None:
    printed = list(yaml.safe_load_all(finetune("crd").stdout))
    assert [crd["spec"]["names"]["kind"] for crd in printed] == ["FinetuneJob", "FinetuneRuntime"]


def test_help_names_every_command_and_the_exit_codes() -> None:
    shown = finetune("--help").stdout
    for word in ("validate", "crd", "run", "prepare", "train", "8 a missed gate"):
        assert word in shown


def test_the_version_is_the_distributions() -> None:
    assert finetune("--version").stdout == f"finetune {importlib.metadata.version('finetune')}\n"


@pytest.mark.parametrize("arguments", [("validat",), ("validate",), ("validate", "-o", "xml", "x"), ("--nope",)])
def test_a_wrong_command_line_ends_with_2_and_the_usage(arguments: tuple[str, ...]) -> None:
    done = finetune(*arguments)
    assert done.returncode == 2
    assert "Usage: finetune" in done.stderr


def test_validating_loads_neither_the_trainer_nor_anything_heavy(job: Path) -> None:
    code = (
        "import sys; from finetune_api.cli import run; assert run(['validate', sys.argv[1]]) == 0; run(['--help']);"
        "heavy = {'torch', 'ray', 'numpy', 'pyarrow', 'kubernetes', 'rich', 'finetune_trainer', 'finetune_operator'};"
        "print('loaded:', heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: set()\n")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """A command `fail`, found like those of the other packages, that raises what the test puts here."""
    raised: dict[str, Exception] = {}

    @click.command()
    def fail() -> None:
        raise raised["it"]

    monkeypatch.setitem(globals(), "fail", fail)
    point = importlib.metadata.EntryPoint("fail", f"{__name__}:fail", "finetune.commands")
    monkeypatch.setattr(cli, "_entry_points", lambda: importlib.metadata.EntryPoints([point]))
    return raised


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("no text", where="rows.jsonl:3", hint="write some"), 3, "rows.jsonl:3: no text\n  → write some\n"),
        (FinetuneError("strange"), 1, "strange\n"),
        (click.Abort(), 130, "interrupted\n"),
    ],
)
def test_every_error_ends_as_a_sentence_and_its_exit_code(
    command: dict[str, Exception], capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    command["it"] = error
    assert cli.run(["fail"]) == code
    assert capsys.readouterr().err == said


def test_an_unforeseen_error_says_where_and_not_the_text_of_a_row(
    command: dict[str, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    command["it"] = KeyError("a user's row")
    assert cli.run(["fail"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("unexpected KeyError in test_api_cli.py:")
    assert "row" not in said


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "trainer"), ("prometheus_client", "operator"), ("ray.train", "trainer")]
)
def test_a_missing_module_names_the_extra_that_brings_it(
    command: dict[str, Exception], capsys: pytest.CaptureFixture[str], module: str, extra: str
) -> None:
    command["it"] = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert cli.run(["fail"]) == 1
    assert f"pip install 'finetune[{extra}]'" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = f"{sys.executable} -m finetune_api crd | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""
