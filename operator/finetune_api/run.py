"""What the pods and `finetune run` hand to each stage: the run's own file, and the names inside its work folder."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from finetune_api.base import Model, ShortText, Uri
from finetune_api.job import FinetuneJobSpec

RUN_FILE: Final = "run.json"
PREPARED: Final = "prepared"  # manifest.json, data-report.json, *.arrow
CHECKPOINTS: Final = "checkpoints"  # step-00000120/
EXPORT: Final = "export"  # model/, or adapter/ and merged/
METRICS_FILE: Final = "metrics.jsonl"  # one event a line
ERROR_LOG: Final = "error.log"  # tracebacks of an unexpected failure
RESULT_FILE: Final = "result.json"  # written last


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder; names are in the order of steps."""
    return f"step-{step:08d}"


class RunConfig(Model):
    """One run of a job. Stages read it from `<work>/run.json`."""

    name: ShortText = Field(description="The job's name.")
    uid: ShortText = Field(description="The job's UID; Ray's run name, the same over attempts.")
    spec: FinetuneJobSpec = Field(description="The job's spec with every default filled in.")
    base_dir: str = Field(description="Folder that relative paths in the spec start from, and must not leave.")
    model_path: str = Field(description="Local folder with the base model, resolved from spec.model.source.")
    work: Uri = Field(description="Work folder of this run (local path here; object storage in a cluster).")
