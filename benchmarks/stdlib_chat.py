"""Chat rows made from the standard library's docstrings: real text that every machine with Python has.

The rows depend only on the Python version: files are read in sorted order, nothing is imported or drawn at random.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "ensurepip"})
SHORTEST, LONGEST = 60, 1200  # characters; the longest answer fits in 512 tokens, so no trainer has to truncate

Row = dict[str, list[dict[str, str]]]


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of each public class and function under `node`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            yield name, docstring
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, name)


def rows() -> Iterator[Row]:
    """One question and answer for each distinct docstring of at least `SHORTEST` characters."""
    root = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, docstring in _documented(ast.parse(path.read_bytes()), module):
            if len(docstring) >= SHORTEST and docstring not in seen:
                seen.add(docstring)
                question = {"role": "user", "content": f"What does {name} do?"}
                yield {"messages": [question, {"role": "assistant", "content": docstring[:LONGEST]}]}


def write_rows(path: Path) -> list[Row]:
    """Writes the rows as JSON Lines and returns them."""
    written = list(rows())
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return written
