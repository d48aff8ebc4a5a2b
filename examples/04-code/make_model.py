"""Gives a folder that 01-quickstart/make_model.py wrote the tokens for fill in the middle, in place of unused ones.

python examples/04-code/make_model.py examples/04-code/model

SmolLM2 has none. The three entries that stood for GitHub issues keep their numbers and vectors, and get new names.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAMES = {
    "<issue_start>": "<fim_prefix>",
    "<issue_comment>": "<fim_middle>",
    "<issue_closed>": "<fim_suffix>",
}


def main(folder: Path) -> None:
    """Renames the entries in the tokenizer's files; once is enough."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.exists():
            text = file.read_text(encoding="utf-8")
            for old, new in NAMES.items():
                text = text.replace(f'"{old}"', f'"{new}"')
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
