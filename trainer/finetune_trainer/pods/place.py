"""Where a pod finds and leaves things. Tests move them by environment variables; in a cluster they are fixed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import SpecError
from finetune_api.run import RunConfig
from finetune_api.stage import MODEL_CLAIM_PATH, PROGRESS_PORT, SCRATCH_PATH
from finetune_trainer import base_model


@dataclass(frozen=True)
class Place:
    """One pod's.

    Attributes:
        scratch: local disk.
        claim: where the volume of a model at pvc:// is mounted.
        termination: file that the kubelet reads when the container ends.
        output: what the container writes to becomes its log.
        port: where the head answers.
        attempt: number of the attempt, from 1.
        address: of the pod, where Ray would find another one.
    """

    scratch: Path
    claim: Path
    termination: Path
    output: Path
    port: int
    attempt: int
    address: str | None

    @classmethod
    def here(cls) -> Place:
        """This pod's."""

        def path(name: str, default: str) -> Path:
            return Path(os.environ.get(f"FINETUNE_{name}", default))

        return cls(
            scratch=path("SCRATCH", SCRATCH_PATH),
            claim=path("MODEL_CLAIM", MODEL_CLAIM_PATH),
            termination=path("TERMINATION_LOG", "/dev/termination-log"),
            output=path("OUTPUT", "/proc/1/fd/1"),
            port=int(os.environ.get("FINETUNE_PROGRESS_PORT", PROGRESS_PORT)),
            attempt=int(os.environ.get("FINETUNE_ATTEMPT", "1")),
            address=os.environ.get("FINETUNE_ADDRESS"),
        )

    def local(self, run: RunConfig) -> RunConfig:
        """The run as the stages see it here: model and work folder are on this pod's disk."""
        model = base_model.in_place(run.spec.model.source, run.base_dir, self.claim) or self.scratch / "model"
        return run.model_copy(update={"work": str(self.scratch / "work"), "model_path": str(model)})


def read_run(file: Path) -> RunConfig:
    """The run that the operator mounted.

    Raises:
        SpecError: the file is missing or is none.
    """
    try:
        return RunConfig.model_validate_json(file.read_bytes())
    except OSError as error:
        raise SpecError(error.strerror or "it cannot be read", where=str(file)) from None
    except ValueError as error:
        raise SpecError(
            f"this is no run.json of this version: {str(error).splitlines()[0]}",
            where=str(file),
            hint="operator and trainer's image must be of one version",
        ) from None
