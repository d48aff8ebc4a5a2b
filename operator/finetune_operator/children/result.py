"""The Job that reads a result from storage when the head that had it is gone."""

from __future__ import annotations

from typing import Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.batch import batch_job
from finetune_operator.children.names import attempt_suffix, result_name, run_config_name
from finetune_operator.children.owner import Manifest, Owner

_CPUS: Final = 0.5  # it reads one small file


def result_job(owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, attempt: int) -> Manifest:
    """The Job of the stage result, about the attempt that ended last. It mounts that attempt's configuration."""
    return batch_job(
        owner,
        spec,
        runtime,
        name=result_name(owner.name),
        stage="result",
        config_map=run_config_name(owner.name, attempt_suffix(attempt)),
        cpus=_CPUS,
        attempt=attempt,
    )
