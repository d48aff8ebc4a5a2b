"""What a worker must not import: each of these costs every rank tens of MiB that training has no use for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from finetune_api.run import RUN_FILE
from tests.tiny import tiny_llama
from tests.trainer.runs import documents, prepare_sequences, run_config

PROGRAM = """
import json, sys
from finetune_trainer.train import main
code = main(sys.argv[1])
print(json.dumps([code, [name for name in sys.argv[2:] if name in sys.modules]]))
"""


def test_full_tuning_does_without_adapters_tables_trackers_and_compilers(tmp_path: Path) -> None:
    prepare_sequences(tmp_path, [[document] for document in documents(4, seed=1)])
    run = run_config(
        tmp_path,
        tiny_llama(tmp_path / "model"),
        training={"maxSteps": 1, "precision": "bf16"},
        deepspeed={"zeroStage": 2},
    )
    (tmp_path / RUN_FILE).write_text(run.model_dump_json())
    unwanted = ["peft", "pandas", "mlflow", "torch._inductor.lowering", "ray", "datasets"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / RUN_FILE), *unwanted]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(printed.splitlines()[-1]) == [0, []]
