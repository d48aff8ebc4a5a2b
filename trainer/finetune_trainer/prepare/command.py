"""`finetune rows`: from the number of a training sequence back to the rows in the job's files."""

from __future__ import annotations

from pathlib import Path

import click

from finetune_api.errors import StorageError
from finetune_api.run import RUN_FILE, RunConfig


@click.command()
@click.argument("work_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("sequences", type=click.IntRange(min=0), nargs=-1, required=True)
def rows(work_dir: Path, sequences: tuple[int, ...]) -> None:
    """Say which rows, by file and line, training sequences are made of.

    An error or a warning about the loss names SEQUENCES by their numbers. WORK_DIR is the run folder, such as
    runs/NAME. The job's files are read once more, which takes about as long as preparing them.
    """
    from finetune_trainer.prepare.origins import origins

    file = work_dir / RUN_FILE
    if not file.exists():
        raise StorageError("there is no run here", where=str(file), hint="name the run folder, such as runs/NAME")
    run = RunConfig.model_validate_json(file.read_bytes())
    for sequence, places in zip(sequences, origins(run, sequences), strict=True):
        for place in places or ["rows of no file, or joined files of a repository"]:
            click.echo(f"sequence {sequence}: {place}")
