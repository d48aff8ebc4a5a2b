"""Looking at a job until it has ended: a view that is drawn anew in a terminal, lines anywhere else."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console
from rich.live import Live

from finetune_api.errors import DataError, GateFailed, StorageError, TrainingError
from finetune_operator.plugin.cluster import Cluster, ClusterError
from finetune_operator.plugin.reading import Shown, read
from finetune_operator.plugin.view import line, status_view

LOOK_SECONDS: Final = 2.0
# How `finetune run` would have ended.
_EXIT_CODES: Final = {
    "UserData": DataError.exit_code,
    "Storage": StorageError.exit_code,
    "GateMissed": GateFailed.exit_code,
}


def exit_code(job: Shown) -> int:
    """What a command that waited for the end of a job ends with."""
    if job.phase == "Complete":
        return 0
    return _EXIT_CODES.get(job.status.reason or "", TrainingError.exit_code)


def watch(cluster: Cluster, name: str, console: Console) -> Shown:
    """Shows the job until it has ended, and returns it. An API server that is away for a while is waited for.

    Raises:
        ClusterError: there is no such job (any more), or it may not be read.
    """
    job = read(cluster.job(name))
    if not console.is_terminal:
        return _lines(cluster, job, console)
    with Live(console=console, auto_refresh=False) as live:
        remark = ""
        while True:
            live.update(status_view(job, cluster.clock.now(), full=False, remark=remark), refresh=True)
            if job.ended:
                return job
            time.sleep(LOOK_SECONDS)
            job, remark = _again(cluster, job)


def _lines(cluster: Cluster, job: Shown, console: Console) -> Shown:
    """A line for each change."""
    shown = None
    while True:
        step = job.status.progress.step if job.status.progress else 0
        if (state := (job.phase, job.status.reason, step)) != shown:
            console.print(line(job, cluster.clock.now()), markup=False)
            shown = state
        if job.ended:
            console.print(job.status.message or "", markup=False)
            return job
        time.sleep(LOOK_SECONDS)
        job, _ = _again(cluster, job)


def _again(cluster: Cluster, job: Shown) -> tuple[Shown, str]:
    """The job as it is now; or as it was, and why."""
    try:
        return read(cluster.job(job.name)), ""
    except ClusterError as error:
        if error.status == 404:
            raise ClusterError(f"{job.name} was deleted meanwhile", status=404) from error
        if not error.passing:
            raise
        return job, f"as it was: {error.what}"
