"""Copies a few packages of Python's standard library, as a repository to learn.

python examples/04-code/make_data.py examples/04-code/data
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

PACKAGES = (
    "collections", "concurrent", "curses", "dbm", "email", "html", "http", "importlib", "json", "logging", "sqlite3",
    "tomllib", "urllib", "wsgiref", "xml", "zoneinfo",
)  # fmt: skip


def main(folder: Path) -> None:
    """Copies the .py files, each below its package's name."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            target = folder / "library" / file.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
