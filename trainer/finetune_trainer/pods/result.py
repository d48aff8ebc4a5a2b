"""The stage result: what a run left under its work prefix, for an operator that could not ask the head any more."""

from __future__ import annotations

from pathlib import Path

from finetune_api import result as run_result
from finetune_api.errors import StorageError
from finetune_api.run import RESULT_FILE, RunConfig
from finetune_api.status import Result
from finetune_trainer import storage
from finetune_trainer.finish import check_gates
from finetune_trainer.pods import exchange
from finetune_trainer.pods.place import Place, read_run
from finetune_trainer.pods.report import reported, status_result


def result(run_file: Path) -> None:
    """Says what came out, in the termination message.

    Raises:
        StorageError: there is no result, or it cannot be read.
        GateFailed: the run missed a gate.
    """
    with reported(Place.here().termination) as ending:
        run = read_run(run_file)
        found = read_result(run)
        ending.facts["result"] = as_status(run, found)
        check_gates(found)


def read_result(run: RunConfig) -> run_result.Result:
    """The run's result.json.

    Raises:
        StorageError: it is not there, of another run, or damaged.
    """
    location = exchange.prefix(run).inside(RESULT_FILE)
    content = storage.read_bytes(location)
    if content is None:
        raise StorageError("the run left no result", where=location.uri, hint="see `kubectl finetune logs`")
    try:
        found = run_result.Result.model_validate_json(content)
    except ValueError:
        raise StorageError(
            "the result is damaged, or of another version", where=location.uri, hint="submit the job again"
        ) from None
    if found.uid != run.uid:
        raise StorageError("the result is another job's", where=location.uri, hint="give each job its own output")
    return found


def as_status(run: RunConfig, found: run_result.Result) -> Result:
    """The result as the operator keeps it."""
    return status_result(found, exchange.origin(run), exchange.manifest_sha256(run))
