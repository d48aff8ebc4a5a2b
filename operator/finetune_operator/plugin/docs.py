"""The reference page of `kubectl finetune`, generated from the help of its commands.

python -m finetune_operator.plugin.docs docs/reference
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from finetune_api.docs import table
from finetune_operator.plugin.command import plugin
from finetune_operator.plugin.help import Command, options

NAME: Final = "kubectl-finetune.md"
_NOTICE: Final = "<!-- Generated from operator/finetune_operator/plugin by `make generate`. Do not edit. -->\n"
_INTRODUCTION: Final = """\
A plugin of kubectl: `kubectl finetune …` runs the script `kubectl-finetune`, wherever that is on the `PATH`.
`pip install 'finetune[operator]'` brings it; in a checkout it is `.venv/bin/kubectl-finetune`. It signs in as kubectl
does, and needs no right but those on FinetuneJobs of the namespace (`get`, `list`; `patch` to suspend and resume,
`delete` to cancel) and, for logs, `list` on `pods` and `get` on `pods/log`.

Ages and times of the end are counted on the API server's clock, so a wrong clock here shows no wrong age.
"""
_IN_ALL: Final = ("context", "help", "kubeconfig", "namespace")


def page() -> str:
    """The Markdown page."""
    context = click.Context(plugin, info_name="kubectl finetune")
    common = [each for each in plugin.commands["plan"].get_params(context) if each.name in _IN_ALL]
    lines = [_NOTICE, "# kubectl finetune\n", _INTRODUCTION]
    lines += [f"{paragraph}\n" for paragraph in _paragraphs(plugin)]
    for name, command in plugin.commands.items():
        assert isinstance(command, Command)
        lines += _command(name, command)
    lines += ["## Options of every command\n", *_options(common)]
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Command) -> list[str]:
    usage = " ".join(["kubectl finetune", name, *command.arguments(), "[options]"])
    own = [each for each in command.params if each.name not in _IN_ALL and isinstance(each, click.Option)]
    return [
        f"## {name}\n",
        f"`{usage}`\n",
        *(f"{paragraph}\n" for paragraph in _paragraphs(command)),
        *(f"    # {what}\n    {line}\n" for what, line in command.examples),
        *(_options(own) if own else []),
    ]


def _options(parameters: Sequence[click.Parameter]) -> list[str]:
    return table(("Option", "Meaning"), [(f"`{usage}`", text) for usage, text in options(parameters)])


def _paragraphs(command: click.Command) -> list[str]:
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n")]


if __name__ == "__main__":
    (Path(sys.argv[1]) / NAME).write_text(page(), encoding="utf-8")
