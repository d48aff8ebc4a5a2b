"""`finetune mirror`: a model of a hub into a bucket, for clusters that reach no hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from finetune_trainer import base_model, hub, storage
from finetune_trainer.manifest import write_json
from finetune_trainer.origin import ORIGIN_FILE


def mirror(source: str, target: str) -> str:
    """Copies a model; its folder in the mirror. A copy that is there already is made again.

    Raises:
        SpecError: the source is no model of a hub.
        ModelError: the hub does not give it.
        StorageError: something cannot be read or written.
    """
    repository, revision = hub.parse(source)
    origin = hub.look(source)
    place = hub.mirrored(target, repository, origin.commit or "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        base_model.fetch(origin, folder, "/")
        (folder / ORIGIN_FILE).unlink()
        write_json(folder / hub.MIRROR_FILE, origin.model_dump(mode="json"))
        storage.publish(folder, place, last=hub.MIRROR_FILE)
        reference = Path(scratch, "reference")
        reference.write_text(f"{origin.commit}\n")
        storage.upload(reference, hub.reference(target, repository, revision))
    return place.uri
