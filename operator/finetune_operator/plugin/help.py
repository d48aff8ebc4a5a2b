"""Help as kubectl prints it: what it does, Examples, Options, Usage."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

_WIDTH: Final = 100


class Command(click.Command):
    """A command whose help looks like that of a kubectl command.

    Args:
        examples: pairs of what is wanted and the line that does it.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\n\n".join(self._sections(ctx)) + "\n")

    def _sections(self, ctx: click.Context) -> Iterator[str]:
        yield paragraphs(self)
        if self.examples:
            lines = "\n\n".join(f"  # {what}\n  {command}" for what, command in self.examples)
            yield f"Examples:\n{lines}"
        yield "Options:\n" + "\n\n".join(
            f"    {usage}:\n        {text}" for usage, text in options(self.get_params(ctx))
        )
        yield "Usage:\n  " + " ".join([ctx.command_path, *self.arguments(), "[options]"])

    def arguments(self) -> Iterator[str]:
        """The command line's arguments as the usage names them."""
        for each in self.params:
            if isinstance(each, click.Argument):
                yield each.human_readable_name if each.required else f"[{each.human_readable_name}]"


class Group(click.Group):
    """The commands of the plugin, in the order they were added."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        listed = "\n".join(
            f"  {name:<{width}}   {each.get_short_help_str(_WIDTH)}" for name, each in self.commands.items()
        )
        formatter.write(
            f"{paragraphs(self)}\n\nAvailable Commands:\n{listed}\n\n"
            f"Usage:\n  {ctx.command_path} COMMAND [options]\n\n"
            f'Use "{ctx.command_path} COMMAND --help" for more about a command.\n'
        )


def paragraphs(command: click.Command) -> str:
    """The help text, its paragraphs wrapped; every one but the first is indented by one, as kubectl does."""
    first, *rest = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    wrapped = [textwrap.fill(first, _WIDTH)]
    wrapped += [textwrap.fill(part, _WIDTH, initial_indent=" ", subsequent_indent=" ") for part in rest]
    return "\n\n".join(wrapped)


def options(parameters: Sequence[click.Parameter]) -> list[tuple[str, str]]:
    """Each option as kubectl writes it, `-n, --namespace=''`, with its help; by name."""
    found = []
    for each in parameters:
        if not isinstance(each, click.Option):
            continue
        short = next((f"{name}, " for name in each.opts if not name.startswith("--")), "")
        long = next(name for name in each.opts if name.startswith("--"))
        found.append((long, f"{short}{long}={_default(each)}", each.help or ""))
    return [(usage, text) for _, usage, text in sorted(found)]


def _default(option: click.Option) -> str:
    value = option.default
    if option.is_flag:
        return "true" if value is True else "false"
    if isinstance(value, int):
        return str(value)
    return f"'{value}'" if isinstance(value, str) else "''"
