"""The reference page of the failure classes, generated from the policies.

python -m finetune_operator.docs docs/reference
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from finetune_api.docs import table
from finetune_operator.failures import POLICIES
from finetune_operator.stuck import WORDS

_NOTICE: Final = "<!-- Generated from operator/finetune_operator by `make generate`. Do not edit. -->\n"
_FOLLOWS: Final = {
    "retries": "another attempt, counted in `limits.retries`",
    "preemptions": "another attempt, counted in `limits.preemptions`",
    "none": "the job fails",
}
_ENDS: Final = """\
Each bad end of an attempt, or of preparing the rows, gets one class. It stands in `status.failures` with a sentence
that says what happened, where, and what to do. A next attempt goes on from the last checkpoint.
"""
_WAITS: Final = """\
`status.reason` says what a job waits for that has not failed. What still holds it up at the operator's start deadline
ends the attempt, with the class beside it; any other word does with `Unknown`, and an image with `Network` where the
registry does not answer.
"""


def failures() -> str:
    """The Markdown page of the classes, and of the words that a job waits with."""
    classes = [(f"`{name}`", policy.about, _FOLLOWS[policy.budget]) for name, policy in POLICIES.items()]
    words = [(f"`{word}`", f"`{reason}`") for word, reason in WORDS.items()]
    lines = [
        _NOTICE,
        "# Failures\n",
        _ENDS,
        *table(("Class", "What happened", "What follows"), classes),
        "## While a job waits\n",
        _WAITS,
        *table(("Word", "Class"), words),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(folder: str) -> None:
    """Writes the page."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "failures.md").write_text(failures(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
