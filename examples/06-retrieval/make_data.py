"""Writes rows.jsonl: questions about the standard library, each with the passage that answers it and two that don't.

python examples/06-retrieval/make_data.py examples/06-retrieval/data
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "bisect", "calendar", "collections", "contextlib", "copy", "csv", "difflib", "fnmatch", "functools", "glob", "gzip",
    "heapq", "html", "io", "json", "locale", "math", "operator", "os", "os.path", "pickle", "pprint", "random", "re",
    "secrets", "shlex", "shutil", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "threading",
    "time", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zlib",
)  # fmt: skip


def passages(module_name: str) -> Iterator[tuple[str, str, str]]:
    """(name, passage, first sentence) of a module's documented functions."""
    module = importlib.import_module(module_name)
    for name in sorted(getattr(module, "__all__", None) or vars(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or not callable(thing):
            continue
        words = " ".join((inspect.getdoc(thing) or "").split())[:300]
        sentence = re.match(r"[A-Z][^.]{20,140}\.(?=\s|$)", words)
        if sentence:
            yield f"{module_name}.{name}", f"{module_name}.{name}: {words}", sentence.group()


def rows() -> Iterator[dict[str, object]]:
    """At most six questions a module; the other passages are its neighbours'."""
    for module in MODULES:
        found = list(passages(module))
        for index, (name, passage, sentence) in enumerate(found[:6]):
            others = [other for _, other, _ in (found[index + 1 :] + found[:index])[:2]]
            if len(others) == 2:
                question = f"What does `{name}` do?"
                yield {"question": question, "oracle": passage, "distractors": others, "answer": sentence}


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
