"""The `finetune` command: what needs no cluster and no GPU, and the door to the commands of the other packages.

Those are found by the entry points `finetune.commands` and loaded when they are asked for, so that validating a file
needs neither torch nor a Kubernetes client.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, TextIO

import click

from finetune_api.errors import FinetuneError, Interrupted, SpecError

_GROUP: Final = "finetune.commands"
_DEBUG: Final = "FINETUNE_DEBUG"
# Said by `finetune --help` without loading the commands themselves.
_ABOUT: Final = {
    "run": "Finetune on this machine: prepare, train, compare, write weights and a report.",
    "plan": "Show what a job needs before anything is spent: memory, time, cost.",
    "prepare": "Check the rows and turn them into token sequences.",
    "train": "Train on prepared rows.",
    "result": "Say what came out of a run, in a pod.",
    "report": "Write the report of a finished run again.",
    "mirror": "Copy a model of a hub to a bucket, for clusters that reach no hub.",
    "rows": "Say which rows training sequences are made of.",
    "operator": "Watch FinetuneJobs in a cluster and bring each to its end.",
}


class _Commands(click.Group):
    """Own commands, and those that entry points name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {*super().list_commands(ctx), *_entry_points().names}
        return [*(name for name in _ABOUT if name in found), *sorted(found - _ABOUT.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if own := super().get_command(ctx, cmd_name):
            return own
        if cmd_name not in _entry_points().names:
            return None
        try:
            loaded = _entry_points()[cmd_name].load()
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        assert isinstance(loaded, click.Command), f"{cmd_name} is not a command"
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._about(ctx, name)) for name in self.list_commands(ctx)])

    def _about(self, ctx: click.Context, name: str) -> str:
        own = super().get_command(ctx, name)
        return own.get_short_help_str(100) if own else _ABOUT.get(name, "")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="finetune", message="finetune %(version)s")
def cli() -> None:
    """Finetune a language model: one YAML file in, weights and a report out.

    Exit codes: 0 done, 2 the job file (or the command line), 3 the rows, 4 the base model, 5 storage, 6 training,
    7 export, 8 a missed gate, 130 interrupted, 1 anything else.
    """


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def validate(files: Sequence[str], output: str) -> None:
    """Check FinetuneJob and FinetuneRuntime files; no cluster is needed.

    Every error of every document is shown at once, with its line, the value and what to do. FILE - is standard input.
    Exit code 2 when anything is wrong.
    """
    from finetune_api.files import check_file

    reports = [check_file(file) for file in files]
    errors = [error for report in reports for error in report.errors()]
    if output == "json":
        click.echo(json.dumps([report.as_json() for report in reports], indent=2))
    else:
        for document in (document for report in reports for document in report.documents if not document.problems):
            click.echo(f"{document.title}: valid")
            if local := document.local_only:
                rest = f" and {len(local) - 3} more" if len(local) > 3 else ""
                click.echo(f"  with `finetune run` only; a cluster cannot see {', '.join(local[:3])}{rest}")
        for error in errors:
            click.echo(str(error), err=True)
        if errors:
            click.echo(f"{len(errors)} {'error' if len(errors) == 1 else 'errors'}", err=True)
    if errors:
        raise click.exceptions.Exit(SpecError.exit_code)


@cli.command()
def crd() -> None:
    """Print the CustomResourceDefinitions, for `kubectl apply --server-side -f -`."""
    from finetune_api.crd import KINDS, manifest_yaml

    click.echo("---\n".join(manifest_yaml(kind) for kind in KINDS), nl=False)


@cache
def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=_GROUP)


def _missing(error: ModuleNotFoundError) -> FinetuneError:
    """Which extra brings a module that is not installed: of several, the one that brings the least."""
    module = (error.name or "").partition(".")[0]
    wanted = module.replace("_", "-").lower()
    brought: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("finetune") or []:
        name = re.match(r"[-A-Za-z0-9_.]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and extra:
            brought.setdefault(extra.group(1), []).append(name.group().replace("_", "-").lower())
    if extras := [extra for extra, names in brought.items() if wanted in names]:
        least = min(extras, key=lambda extra: len(brought[extra]))
        hint = f"pip install 'finetune[{least}]', or uv sync --extra {least} in a checkout"
        return FinetuneError(f"this command needs {module}, which is not installed", hint=hint)
    return FinetuneError(f"the module {error.name} is missing", hint="install finetune again")


def run(arguments: Sequence[str] | None = None, command: click.Command = cli, name: str = "finetune") -> int:
    """Runs the command line and returns its exit code; every error ends as a sentence on stderr."""
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say(Interrupted("interrupted"))
    except FinetuneError as error:
        return _say(error)
    except ModuleNotFoundError as error:
        return _say(_missing(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to tell anyone
        return 0
    except Exception as error:
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        # Not the exception's own text, which may hold a user's row.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"unexpected {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        return _say(FinetuneError(what, hint=f"this is a bug; {_DEBUG}=1 shows all of it"))


def _say(error: FinetuneError) -> int:
    click.echo(str(error), err=True)
    return error.exit_code


def _forgiving(stream: TextIO) -> None:
    """Lets a terminal that lacks a character show its escape instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def main(command: click.Command = cli, name: str = "finetune") -> None:
    """Entry point of the `finetune` script, and of others that end the same way."""
    _forgiving(sys.stdout)
    _forgiving(sys.stderr)
    sys.exit(run(command=command, name=name))
