"""From the number of a sequence, which an error or a spike names, back to the rows in the user's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune_api.errors import SpecError
from finetune_api.run import RUN_FILE
from finetune_trainer.prepare.command import rows
from finetune_trainer.prepare.origins import origins
from tests.tiny import tiny_llama
from tests.trainer.jobs import Prepared, chats, jsonl, run_config


def test_each_sequence_leads_to_the_lines_of_its_rows(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(30)))
    run = run_config(tmp_path, model)
    prepared = Prepared(run)
    count = prepared.manifest.splits.train.sequences
    found = origins(run, range(count))
    lines = sorted(int(place.rpartition(":")[2]) for places in found for place in places)
    assert lines == list(range(1, 31)), "every row is in one sequence"
    assert all(places for places in found)
    with pytest.raises(SpecError, match=f"no sequence {count}"):
        origins(run, [count])

    (Path(run.work) / RUN_FILE).write_text(run.model_dump_json())
    told = CliRunner().invoke(rows, [run.work, "0"])
    assert told.exit_code == 0, told.output
    assert told.output == "".join(f"sequence 0: {place}\n" for place in found[0])
