"""Pictures for docs/tour.md, made when FINETUNE_PICTURES names their folder; Chromium draws what has no window."""

from __future__ import annotations

import html
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

_FOLDER: Final = os.environ.get("FINETUNE_PICTURES")
_PAGE: Final = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #16181d; }}
pre {{ margin: 0; padding: 16px 20px; color: #e4e6eb; font: 14px/20px "DejaVu Sans Mono", monospace; }}
</style><pre>{}</pre>"""


def folder() -> Path | None:
    """Where pictures go; None: none are wanted."""
    return Path(_FOLDER) if _FOLDER else None


def draw_terminal(text: str, path: Path) -> None:
    """Draws lines as a terminal shows them."""
    lines = [line.rstrip() for line in text.replace("\r", "").rstrip().split("\n")]
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        page.write(_PAGE.format(html.escape("\n".join(lines))))
        page.flush()
        draw_page(Path(page.name), path, max(map(len, lines)) * 9 + 40, len(lines) * 20 + 32)


def draw_page(page: Path, path: Path, width: int, height: int) -> None:
    """Draws the top of a page in a window of this many pixels."""
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        "--disable-gpu",
        f"--window-size={width},{height}",
        f"--screenshot={path.resolve()}",
        page.resolve().as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
