"""Writes functions.jsonl: what the standard library says of a function, without its first sentence, and that sentence.

python examples/07-completion/make_data.py examples/07-completion/data
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
    "ast", "base64", "bisect", "calendar", "codecs", "collections", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "enum", "fnmatch", "fractions", "functools", "gettext", "glob", "gzip", "heapq",
    "hmac", "html", "inspect", "io", "ipaddress", "itertools", "json", "linecache", "locale", "logging", "math",
    "mimetypes", "operator", "os", "pathlib", "pickle", "pkgutil", "platform", "pprint", "random", "re", "secrets",
    "select", "shlex", "shutil", "signal", "site", "socket", "sqlite3", "statistics", "string", "struct", "subprocess",
    "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "time", "tokenize", "traceback", "types", "typing",
    "unicodedata", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile", "zlib",
)  # fmt: skip


def rows() -> Iterator[dict[str, str]]:
    """One a function that says more of itself than a sentence."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or not callable(thing):
                continue
            words = " ".join((inspect.getdoc(thing) or "").split())
            sentence = re.match(r"[A-Z][^.]{15,110}\.(?=\s)", words)
            rest = words[sentence.end() :].strip()[:400] if sentence else ""
            if sentence and len(rest) > 60:
                about = f"Function: {module_name}.{name}\nDetails: {rest}\nSummary:"
                yield {"about": about, "summary": sentence.group()}


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "functions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
