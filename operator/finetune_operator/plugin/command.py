"""`kubectl finetune`: its commands and flags. What needs the Kubernetes client is loaded when it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from finetune_api import cli
from finetune_api.errors import FinetuneError, Interrupted
from finetune_operator.plugin.help import Command, Group

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from finetune_operator.plugin.cluster import Cluster
    from finetune_operator.plugin.reading import Shown

F = TypeVar("F", bound=Callable[..., Any])

_ENDLESS: Final = 100_000  # columns of what is no terminal: nothing is cut or broken there
_JOB: Final = click.argument("job", metavar="JOB")


def _where(command: F) -> F:
    """kubectl's own flags for the cluster and the namespace."""
    for option in (
        click.option("--kubeconfig", metavar="FILE", help="Path to the kubeconfig file to use for CLI requests."),
        click.option("--context", metavar="NAME", help="The name of the kubeconfig context to use."),
        click.option("-n", "--namespace", metavar="NAME", help="If present, the namespace scope for this request."),
    ):
        command = option(command)
    return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="finetune", message="kubectl-finetune %(version)s", help="Print the version.")
@_where
def plugin(**_: Any) -> None:
    """Show and steer FinetuneJobs: how far they are, what they say, what came out.

    A job is made by `kubectl apply -f job.yaml`; `finetune validate job.yaml` checks the file first, without a cluster.

    Exit codes: 0 done; 2 the command line; 1 the cluster; 130 Ctrl-C. `status --watch` ends as the job did: 0 Complete,
    3 bad rows, 5 storage, 8 a missed gate, 6 any other failure.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _output(*forms: str, text: str) -> Callable[[F], F]:
    return click.option("-o", "--output", type=click.Choice(forms), help=f"One of: {', '.join(forms)}. {text}")


@plugin.command(
    cls=Command,
    examples=[
        ("All jobs of the namespace", "kubectl finetune status"),
        ("Look at one job until it has ended", "kubectl finetune status support-chat"),
        ("As it is now, with every failure", "kubectl finetune status support-chat --once"),
        ("Wait for the end in a script; the exit code says how it ended", "kubectl finetune status support-chat -w"),
        ("All jobs of all namespaces, with more columns", "kubectl finetune status -A -o wide"),
    ],
)
@click.argument("job", required=False, metavar="JOB")
@_where
@click.option("-A", "--all-namespaces", is_flag=True, help="If true, list the jobs of all namespaces.")
@click.option("-w", "--watch", is_flag=True, help="Show JOB until it has ended. The default in a terminal.")
@click.option("--once", is_flag=True, help="Show JOB as it is now. The default where there is no terminal.")
@_output("wide", "json", "yaml", text="json and yaml are the objects of the API.")
def status(job: str | None, all_namespaces: bool, watch: bool, once: bool, output: str | None, **where: Any) -> None:
    """Show how jobs get on.

    With JOB: phase and why, progress, loss, speed, when it ends, cost, where the time of the GPUs went, checkpoint,
    failures and what it was planned to need. Times are the API server's.
    """
    if job is None and (watch or once):
        raise click.UsageError("--watch and --once need a JOB; `kubectl get ftj -w` follows all jobs.")
    if watch and (once or output):
        raise click.UsageError("--watch goes with neither --once nor --output.")
    if job is not None and all_namespaces:
        raise click.UsageError("a JOB has one namespace: say -n NAMESPACE instead of --all-namespaces.")
    cluster = _connect(where)
    if job is None:
        _list(cluster, everywhere=all_namespaces, output=output)
    elif output in ("json", "yaml"):
        _print_data(_plain(cluster.job(job)), output)
    elif watch or (not once and output is None and sys.stdout.isatty()):
        _watch(cluster, job)
    else:
        from finetune_operator.plugin.view import status_view

        shown = _read(cluster, job)
        _print(status_view(shown, cluster.clock.now()))


@plugin.command(
    cls=Command,
    examples=[
        ("Everything that pods of the job still have to say", "kubectl finetune logs support-chat"),
        ("Follow it, over all attempts, until the job has ended", "kubectl finetune logs support-chat -f"),
        ("What the head of the second attempt says", "kubectl finetune logs support-chat --attempt 2 --head"),
        (
            "The last lines before containers were restarted",
            "kubectl finetune logs support-chat -p --tail 50",
        ),
        ("Why the rows were refused", "kubectl finetune logs support-chat --stage prepare"),
    ],
)
@_JOB
@_where
@click.option("--stage", type=click.Choice(["prepare", "train", "result"]), help="Only pods of this stage.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only pods of this attempt, from 1.")
@click.option("--head", is_flag=True, help="Only head pods, where the driver runs.")
@click.option(
    "--rank", type=click.IntRange(min=0), metavar="N", help="Only lines of this rank, from 0. They begin with [rank N]."
)
@click.option("-f", "--follow", is_flag=True, help="Go on, also with pods that come later, until the job has ended.")
@click.option("--tail", type=click.IntRange(min=-1), default=-1, metavar="N", help="Last lines of each pod; -1: all.")
@click.option("-p", "--previous", is_flag=True, help="What containers wrote before their last restart.")
@click.option("--prefix", is_flag=True, help="Begin lines with their pod. So it is anyway with more than one pod.")
def logs(job: str, follow: bool, prefix: bool, head: bool, rank: int | None, tail: int, **rest: Any) -> None:
    """Print the logs of a job's pods: prepare, each attempt with its head first, result.

    Logs go with their pods. The operator deletes the pods of an attempt that has ended, since they hold GPUs; the last
    words of such an attempt are in `kubectl finetune status JOB --once`.
    """
    from finetune_operator.plugin import logs as pods

    chosen = {key: rest.pop(key) for key in ("stage", "attempt", "previous")}
    if head and rank is not None:
        raise click.UsageError("--head and --rank exclude each other: ranks run in worker pods.")
    if follow and chosen["previous"]:
        raise click.UsageError("--follow and --previous exclude each other.")
    wanted = pods.Wanted(**chosen, head=head, rank=rank, tail=None if tail < 0 else tail)
    cluster = _connect(rest)
    shown = _read(cluster, job)
    found = pods.sources(cluster.pods(job), wanted)
    if not found and (not follow or shown.ended):
        what, hint = pods.nothing(shown, wanted)
        raise FinetuneError(what, hint=hint)
    printer = pods.Printer(_write, _remark, prefix=prefix or follow or len(found) > 1)
    if follow:
        _until_interrupted(lambda: pods.follow(cluster, job, wanted, printer))
        return
    lost = pods.lost_attempts(shown, found) if wanted.stage is None and wanted.attempt is None else []
    for number in lost:
        _remark(f"attempt {number} has no pods any more, and so no logs")
    if pods.show(cluster, found, wanted, printer) == 0 and rank is not None:
        _remark(f"no line of rank {rank} in {', '.join(source.pod for source in found)}")


@plugin.command(
    cls=Command,
    examples=[
        ("What came out", "kubectl finetune report support-chat"),
        ("Where the weights are, for a script", "kubectl finetune report support-chat -o json | jq -r .result.uri"),
    ],
)
@_JOB
@_where
@_output("json", "yaml", text="The same for programs.")
def report(job: str, output: str | None, **where: Any) -> None:
    """Show what came out of a job: evaluation loss of base and tuned model, gates, weights.

    The whole report, prompt by prompt, is the page report.html in the job's bucket; its address is shown. For a run on
    this machine there is `finetune report`.
    """
    from finetune_operator.plugin.result import result_json, result_view

    shown = _read(_connect(where), job)
    result = shown.status.result
    if result is None:
        hint = "`kubectl finetune status` shows how far it is"
        if shown.ended:
            hint = shown.status.message or "it does not say why"
        raise FinetuneError(f"{job} is {shown.phase} and has no result{'' if shown.ended else ' yet'}", hint=hint)
    if output:
        _print_data(result_json(shown, result), output)
    else:
        _print(result_view(shown, result))


@plugin.command(cls=Command, examples=[("Free the GPUs for a while", "kubectl finetune suspend support-chat")])
@_JOB
@_where
def suspend(job: str, **where: Any) -> None:
    """Let a job write a checkpoint, free its GPUs and wait.

    Nothing is lost: `resume` goes on from that checkpoint.
    """
    cluster = _connect(where)
    shown = _changeable(cluster, job)
    if shown.spec.get("suspend"):
        click.echo(f"{job} is suspended already ({shown.phase})")
        return
    cluster.change_job(job, {"spec": {"suspend": True}})
    click.echo(f"{job} is being suspended: it writes a checkpoint, then its pods end")


@plugin.command(cls=Command, examples=[("Go on", "kubectl finetune resume support-chat")])
@_JOB
@_where
def resume(job: str, **where: Any) -> None:
    """Let a suspended job go on from its last checkpoint."""
    cluster = _connect(where)
    shown = _changeable(cluster, job)
    if not shown.spec.get("suspend"):
        click.echo(f"{job} is not suspended ({shown.phase})")
        return
    cluster.change_job(job, {"spec": {"suspend": False}})
    checkpoint = shown.status.checkpoint
    click.echo(f"{job} goes on from {f'step {checkpoint.step:,}' if checkpoint else 'the beginning'}")


@plugin.command(
    cls=Command,
    examples=[
        ("Stop a job for good; it asks first", "kubectl finetune cancel support-chat"),
        ("Without being asked", "kubectl finetune cancel support-chat --yes"),
    ],
)
@_JOB
@_where
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(job: str, yes: bool, **where: Any) -> None:
    """Stop a job for good: it is deleted, and its pods with it.

    What is in the bucket stays: weights, report, checkpoints. To go on later, use `suspend` instead.
    """
    cluster = _connect(where)
    shown = _read(cluster, job)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("there is nobody to ask whether to delete the job: say --yes.")
        click.confirm(f"Delete {job} in namespace {shown.namespace}, which is {shown.phase}?", abort=True)
    cluster.delete_job(job, shown.uid)
    click.echo(f"{job} is deleted; its pods end within two minutes")
    stays = {
        "weights": shown.status.result.uri if shown.status.result else None,
        "checkpoint": shown.status.checkpoint.uri if shown.status.checkpoint else None,
    }
    for what, uri in stays.items():
        if uri:
            click.echo(f"  kept: {what} {uri}")


@plugin.command(cls=Command, examples=[("What the run needs", "kubectl finetune plan support-chat")])
@_JOB
@_where
@_output("json", "yaml", text="`status.plan` of the job.")
def plan(job: str, output: str | None, **where: Any) -> None:
    """Show what a job will need, as its prepare stage found out: steps, tokens, memory, time, cost."""
    if job.endswith((".yaml", ".yml", ".json")) or "/" in job:
        hint = f"`finetune plan {job}` plans a file, and needs no cluster; here, give the name of a job"
        raise FinetuneError("this command shows the plan of a job in the cluster, not of a file", hint=hint)
    from finetune_operator.plugin.view import plan_view

    shown = _read(_connect(where), job)
    if shown.status.plan is None:
        hint = shown.status.message or "the operator has not looked at it yet"
        raise FinetuneError(f"{job} has no plan yet; prepare makes it. It is {shown.phase}", hint=hint)
    if output:
        _print_data(shown.status.plan.model_dump(exclude_none=True), output)
    else:
        _print(plan_view(shown.status.plan))


def _connect(where: dict[str, Any]) -> Cluster:
    from finetune_operator.plugin.cluster import connect

    before = click.get_current_context().find_root().params  # flags may also stand before the command
    return connect(*(where[key] or before[key] for key in ("kubeconfig", "context", "namespace")))


def _read(cluster: Cluster, job: str) -> Shown:
    from finetune_operator.plugin.reading import read

    return read(cluster.job(job))


def _changeable(cluster: Cluster, job: str) -> Shown:
    shown = _read(cluster, job)
    if shown.ended:
        raise FinetuneError(f"{job} has ended ({shown.phase}) and stays so", hint="make a new job to train again")
    return shown


def _list(cluster: Cluster, *, everywhere: bool, output: str | None) -> None:
    from finetune_operator.plugin.reading import read
    from finetune_operator.plugin.tables import jobs_table

    found = cluster.jobs(everywhere=everywhere)
    if output in ("json", "yaml"):
        _print_data({"apiVersion": "v1", "kind": "List", "items": [_plain(each) for each in found]}, output)
    elif found:
        shown = [read(each) for each in found]
        click.echo(jobs_table(shown, cluster.clock.now(), namespaces=everywhere, wide=output == "wide"))
    else:
        click.echo(f"No FinetuneJobs found{'' if everywhere else f' in {cluster.namespace} namespace'}.", err=True)


def _watch(cluster: Cluster, job: str) -> None:
    from finetune_operator.plugin.live import exit_code, watch

    ended = _until_interrupted(lambda: watch(cluster, job, _console()))
    raise click.exceptions.Exit(exit_code(ended))


T = TypeVar("T")


def _until_interrupted(do: Callable[[], T]) -> T:
    """Ctrl-C is how one leaves these commands: it needs no words."""
    try:
        return do()
    except KeyboardInterrupt:
        raise click.exceptions.Exit(Interrupted.exit_code) from None


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """An object as kubectl shows it: without the book of who set which field."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "managedFields"}
    return manifest | {"metadata": metadata}


def _print_data(data: dict[str, Any], form: str) -> None:
    if form == "json":
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _ENDLESS)


def _print(view: RenderableType) -> None:
    console = _console()
    if console.is_terminal:
        console.print(view)
        return
    with console.capture() as captured:
        console.print(view)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))  # rich fills lines with spaces


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _remark(text: str) -> None:
    click.echo(text, err=True)


def main() -> None:
    """Entry point of the script `kubectl-finetune`, which kubectl finds on the PATH."""
    cli.main(plugin, "kubectl finetune")
