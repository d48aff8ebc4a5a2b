"""Writes texts.jsonl: the documentation inside of Python's standard library, a module at a time.

python examples/05-pretrain/make_data.py examples/05-pretrain/data
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path

MODULES = (
    "argparse", "array", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "email", "enum", "fractions",
    "functools", "glob", "gzip", "hashlib", "heapq", "http.client", "inspect", "io", "ipaddress", "itertools", "json",
    "locale", "logging", "math", "mimetypes", "numbers", "operator", "os", "pathlib", "pickle", "queue", "random", "re",
    "sched", "secrets", "shlex", "shutil", "signal", "socket", "sqlite3", "statistics", "string", "struct",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "traceback", "typing", "unittest",
    "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip


def document(name: str) -> str:
    """A module's own words about itself and what it offers."""
    module = importlib.import_module(name)
    parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
    for each in sorted(getattr(module, "__all__", None) or vars(module)):
        thing = getattr(module, each, None)
        said = inspect.getdoc(thing) if callable(thing) and not each.startswith("_") else None
        if said:
            parts.append(f"{name}.{each}\n\n{said}")
    return "\n\n".join(parts)


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document(name)[:6000] for name in MODULES]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
