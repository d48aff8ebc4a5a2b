"""The reference pages of the failure classes, the rights, the settings and the chart's values.

python -m finetune_operator.docs docs/reference
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from finetune_api.docs import table
from finetune_operator import chart, rights
from finetune_operator.command import PREFIX, operator
from finetune_operator.failures import POLICIES
from finetune_operator.rights import Right
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
_RIGHTS: Final = """\
What `manifests/install.yaml` allows, and why. Each row is asserted against a real API server in
`tests/api/test_rbac.py`, with that nothing else is allowed.

## The operator

Service account `finetune-operator` in namespace `finetune-system`. No right on Secrets, and none to make pods, roles or
resource definitions. It makes RayJobs and Jobs, though, and whoever can do that can run pods in that namespace: the
operator's token is worth as much as the `edit` role's in every namespace where it is bound.

In the namespaces of jobs, as ClusterRole `finetune-operator`:
"""
_HEALTH: Final = """\
`/healthz` fails when the process should be started again: a cache that nothing is certain about for 75 s (10 minutes
while the API server refuses or does not answer, since a restart brings none back), or jobs that wait while none is
finished for 2 minutes. `/readyz` fails while a cache is not filled or its watch is failing. A replica that does not
lead fills its caches too, and is ready to take over.
"""
_METRICS: Final = """\
[metrics.md](metrics.md) has them all, with those of the jobs' training.
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


def rbac() -> str:
    """The Markdown page of all rights."""
    lines = [
        _NOTICE,
        "# Rights\n",
        _RIGHTS,
        *_rows(rights.IN_JOB_NAMESPACES),
        "In the whole cluster, as ClusterRole `finetune-operator-cluster`:\n",
        *_rows(rights.IN_CLUSTER),
        "In its own namespace, as Role `finetune-operator`:\n",
        *_rows(rights.IN_OWN_NAMESPACE),
        "## People\n",
        "Who has `edit` or `admin` in a namespace may do there:\n",
        *_rows(rights.EDITORS),
        "Who has `view` there:\n",
        *_rows(rights.VIEWERS),
        "Runtimes are the admin's and in no namespace. Whom you bind to ClusterRole `finetune-runtime-reader`:\n",
        *_rows(rights.RUNTIME_READERS),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rows(allowed: Sequence[Right]) -> list[str]:
    rows = [
        (
            f"`{right.resource.group}`" if right.resource.group else "",
            f"`{right.target}`" + "".join(f" `{name}`" for name in right.names),
            ", ".join(right.verbs),
            right.why,
        )
        for right in allowed
    ]
    return table(("Group", "Resource", "Verbs", "What for"), rows)


def settings() -> str:
    """The Markdown page of the operator's flags, and of its health."""
    flags = [
        (
            " / ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts)),
            f"`{PREFIX}_{(option.name or '').upper()}`",
            f"`{str(option.default).lower()}`"
            if isinstance(option.default, str | int) and option.default != ""
            else "",
            option.help or "",
        )
        for option in operator.params
        if isinstance(option, click.Option)
    ]
    lines = [
        _NOTICE,
        "# The operator's settings and health\n",
        inspect.cleandoc(operator.help or "") + "\n",
        *table(("Flag", "Variable", "Default", "Meaning"), flags),
        "## Health\n",
        _HEALTH,
        "## Metrics\n",
        _METRICS,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _shown(default: object) -> str:
    return f"`{str(default).lower()}`" if isinstance(default, str | int) and default != "" else ""


def pages() -> dict[str, str]:
    """Every page, by its file name."""
    return {"chart.md": chart.reference(), "failures.md": failures(), "operator.md": settings(), "rbac.md": rbac()}


def main(folder: str) -> None:
    """Writes the pages."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
