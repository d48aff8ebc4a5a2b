"""The Job that checks the rows and turns them into token sequences, before a GPU is taken."""

from __future__ import annotations

from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.children.batch import batch_job
from finetune_operator.children.names import prepare_name, run_config_name
from finetune_operator.children.owner import Manifest, Owner


def prepare_job(owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec) -> Manifest:
    """The Job of the stage prepare."""
    return batch_job(
        owner,
        spec,
        runtime,
        name=prepare_name(owner.name),
        stage="prepare",
        config_map=run_config_name(owner.name, "prepare"),
        cpus=runtime.resources.prepare_cpus,
    )
