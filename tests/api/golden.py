"""What users read, kept in a file: a change of words is seen in the difference.

UPDATE_GOLDEN=1 writes the files anew, with what the tests of that run have said.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from tests.api.objects import Object

_FOLDER: Final = Path(__file__).with_name("golden")
# What differs each time.
_WORDS: Final = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\bnode-[0-9a-f]{5}-\d+", "NODE"),
    (r"\btest-[a-z0-9]{5}\b", "NAME"),
    (r"(-a\d+-)[a-z0-9]{5}(?=-head|-workers)", r"\1X"),
    (r"(-prepare-|-result-|-head-|-workers-worker-)[a-z0-9]{5}\b", r"\1X"),
    (r"(/[a-z-]+)-[0-9a-f]{8}/", r"\1-UID/"),
    (r"\bstep-\d{8}", "step-N"),
    (r"\bcheckpoint of step \d+", "checkpoint of step N"),
    (r"\b\d+ of \d+ pods find", "N of N pods find"),
    (r"( and \d+ more)? cannot get", " cannot get"),
    (r"\bthere are: [^.]*\.", "there are: NAMES."),
    (r"\bnot got on for \d+s", "not got on for Ns"),
    (r"\bhas cost \d+\.\d+", "has cost N"),
)


class Golden:
    """One file of texts, each under its story."""

    def __init__(self, name: str) -> None:
        self._path = _FOLDER / name
        self._update = bool(os.environ.get("UPDATE_GOLDEN"))
        self._texts: dict[str, str] = {}
        if self._path.exists() and not self._update:
            for block in self._path.read_text(encoding="utf-8").split("# ")[1:]:
                story, _, text = block.partition("\n")
                self._texts[story] = text.strip("\n")

    def check(self, story: str, text: str) -> None:
        """Fails when the text is not the one in the file."""
        if self._update:
            self._texts[story] = text
        assert text == self._texts.get(story, ""), f"{self._path.name}, {story}"

    def close(self) -> None:
        """Writes the file, if that is asked for."""
        if self._update:
            texts = [f"# {story}\n{text}\n" for story, text in sorted(self._texts.items())]
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text("\n".join(texts), encoding="utf-8")


def as_text(status: Object) -> str:
    """A job's status as its user reads it, without what differs each time."""
    lines = [f"{status['phase']} ({status['reason']}): {status.get('message', '')}".strip()]
    for each in status.get("failures", []):
        again = "may be tried again" if each["retryable"] else "final"
        lines.append(f"    attempt {each['attempt']} failed ({each['reason']}, {again}): {each['message']}")
    text = "\n".join(lines)
    for pattern, word in _WORDS:
        text = re.sub(pattern, word, text)
    return text
