"""Rules of the code base that no linter knows: small files with one job each, source roots that shadow nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(
    path
    # The examples' folders also hold what their scripts wrote: for one of them that is Python's own library.
    for files in (
        "benchmarks/**/*.py",
        "examples/*/*.py",
        "operator/**/*.py",
        "scripts/**/*.py",
        "tests/**/*.py",
        "trainer/**/*.py",
    )
    for path in ROOT.glob(files)
)
SOURCE = [path for path in CODE if path.is_relative_to(ROOT / "operator") or path.is_relative_to(ROOT / "trainer")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_a_file_fits_in_the_head() -> None:
    assert names([path for path in CODE if len(path.read_text(encoding="utf-8").splitlines()) >= 400]) == []


def test_a_file_says_its_job_first() -> None:
    # The names of its tests say what a test file is about.
    files = [path for path in CODE if not path.name.startswith("test_") and path.stat().st_size]
    silent = [path for path in files if not ast.get_docstring(tree(path))]
    assert names(silent) == []


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_the_code_is_found() -> None:
    assert SOURCE


@pytest.mark.parametrize("root", ["operator", "trainer"])
def test_a_source_root_is_no_package(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists()


def test_the_standard_librarys_operator_is_not_shadowed_in_the_checkout() -> None:
    script = "import operator; print(operator.__file__)"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not Path(found.strip()).is_relative_to(ROOT / "operator")


def test_no_private_name_crosses_a_module_border() -> None:
    """A leading underscore means: only here. What others need has a public name and a docstring."""
    crossings = [
        f"{path.relative_to(ROOT)}:{node.lineno} {alias.name}"
        for path in SOURCE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetune_")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert crossings == []
