"""`finetune plan`: the plan of a job file as a table, or as JSON."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from finetune_api.errors import ModelError, SpecError, join
from finetune_api.files import check_file, load_job
from finetune_api.job import FinetuneJob
from finetune_api.run import PREPARED, Device
from finetune_api.runtime import FinetuneRuntime
from finetune_trainer.manifest import MANIFEST_FILE, Manifest, read_manifest

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_UNITS: Final = {"Mi": 2**20, "Gi": 2**30}
_PRODUCT: Final = "nvidia.com/gpu.product"  # the label that NVIDIA's feature discovery gives nodes


def _memory(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]*)(Mi|Gi)", text)
    if not found:
        raise click.BadParameter("write a size such as 80Gi")
    return int(found[1]) * _UNITS[found[2]]


@click.command()
@click.argument("file", type=_FILE)
@click.option("--runtime", type=_FILE, help="FinetuneRuntime whose GPU and price are used.")
@click.option("--gpu", help="GPU's product name, such as H100 or NVIDIA-L40S; tells how fast it is.")
@click.option("--gpu-memory", callback=_memory, help="Memory of one GPU, such as 80Gi; tells whether the job fits.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="What one GPU costs for an hour.")
@click.option("--currency", help="Currency of the price.  [default: USD]")
@click.option("--model", type=_FOLDER, help="Folder with the model's config.json, instead of spec.model.source.")
@click.option("--work-dir", type=_FOLDER, help="Run folder whose prepared rows are counted.  [default: runs/NAME]")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def plan(
    file: Path,
    runtime: Path | None,
    gpu: str | None,
    gpu_memory: int | None,
    price_per_hour: float | None,
    currency: str | None,
    model: Path | None,
    work_dir: Path | None,
    output: str,
) -> None:
    """Show what a job needs before anything is spent: memory by part, ZeRO stage, time, cost.

    FILE holds one FinetuneJob. Of its model only config.json is read. Exit code 2 when the job does not fit its GPUs;
    then the settings that make it fit are named.
    """
    from rich.console import Console

    from finetune_trainer.planning import plan as plan_job
    from finetune_trainer.planning.view import view

    job = load_job(file)
    given = {
        "memory_bytes": gpu_memory,
        "product": gpu,
        "price_per_hour": price_per_hour,
        "currency": currency,
    }
    known = {name: value for name, value in given.items() if value is not None}
    device = (_device(runtime) if runtime else Device()).model_copy(update=known)
    manifest = _manifest(job, work_dir)
    with _config_folder(job.spec.model.source, file.parent.resolve(), model) as folder:
        planned = plan_job(job.spec, folder, device, manifest)
    if output == "json":
        click.echo(json.dumps(planned.as_json(), indent=2))
    else:
        Console(highlight=False).print(view(planned, job.metadata.name))
    if not planned.fits:
        raise planned.refusal()


def _device(file: Path) -> Device:
    """The accelerator of the one FinetuneRuntime in a file."""
    report = check_file(file)
    if errors := report.errors():
        raise errors[0] if len(errors) == 1 else SpecError(join(errors))
    found = [document.resource for document in report.documents if isinstance(document.resource, FinetuneRuntime)]
    if len(found) != 1:
        raise SpecError(f"one FinetuneRuntime is needed, and there are {len(found)}", where=str(file))
    accelerator = found[0].spec.accelerator
    return Device(
        memory_bytes=accelerator.memory_bytes,
        product=found[0].spec.node_selector.get(_PRODUCT),
        price_per_hour=accelerator.price_per_hour,
        currency=accelerator.currency,
    )


def _manifest(job: FinetuneJob, work_dir: Path | None) -> Manifest | None:
    """What was prepared for the job with its sequence length; None when nothing was, and no folder is named."""
    prepared = (work_dir or Path("runs") / job.metadata.name) / PREPARED
    if work_dir is None and not (prepared / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(prepared)
    return manifest if manifest.sequence_length == job.spec.data.sequence_length else None


@contextmanager
def _config_folder(source: str, base_dir: Path, given: Path | None) -> Iterator[Path]:
    """A local folder with the model's config.json; from a bucket or hub the weights are not copied."""
    from finetune_trainer import base_model
    from finetune_trainer.tokenizer import CONFIG_FILE

    given = given or base_model.in_place(source, base_dir)
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            base_model.fetch(base_model.look(source, base_dir), Path(folder, "model"), base_dir, weights=False)
            yield Path(folder, "model")
        return
    if not (given / CONFIG_FILE).is_file():
        raise ModelError(
            "there is no config.json", where=str(given), hint="check spec.model.source, or give --model FOLDER"
        )
    yield given
