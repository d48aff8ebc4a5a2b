"""The GPU benchmark can be tried without a GPU, so that it works on the day that there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_a_dry_run_measures_every_case() -> None:
    done = _run("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:5]] == [
        "| lora",
        "| lora, recomputed",
        "| full, optimizer offloaded, recomputed",
        "| lora, recomputed",
    ]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows[1:5])
    assert rows[4][1] == "128"  # twice the first length: it went on until its end
