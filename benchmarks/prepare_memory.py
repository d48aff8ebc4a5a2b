"""Resident memory and speed of the prepare stage on JSONL files of growing size.

    python benchmarks/prepare_memory.py [GIGABYTES ...]

Rows are chats whose sentences are drawn from the standard library's docstrings; every fiftieth repeats an earlier row.
Memory is the highest that each process has had resident (VmHWM), so a short peak counts. Everything is in a temporary
folder (about five times the file, TMPDIR says where) and is deleted.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from stdlib_chat import rows

SAMPLE_SECONDS = 0.2
LINES_A_ROW = 16  # about a kilobyte


@dataclass(frozen=True)
class Measure:
    """One run: wall-clock seconds, and the largest resident memory of the parent and of any of its workers, in KiB."""

    seconds: float
    parent: int
    worker: int


def write_jsonl(path: Path, size: int) -> int:
    """Writes rows until the file has `size` bytes; returns their number. The same size gives the same bytes."""
    lines = [line.strip() for row in rows() for line in row["messages"][1]["content"].splitlines()]
    lines = [line for line in lines if len(line) > 20]
    draw = random.Random(0)
    count = written = 0
    earlier = ""
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            if count % 50 != 49:
                question, *answer = draw.choices(lines, k=LINES_A_ROW)
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "\n".join(answer)}]
                text = json.dumps({"messages": messages}) + "\n"
                earlier = text if count % 50 == 0 else earlier
            written += file.write(text if count % 50 != 49 else earlier)
            count += 1
    return count


def run(folder: Path) -> None:
    """Prepares `folder`/rows.jsonl in this process and its workers."""
    from finetune_api.run import RunConfig
    from finetune_trainer.prepare import prepare

    spec = {
        "model": {"source": "model"},
        "data": {"train": [{"uri": "rows.jsonl"}], "sequenceLength": 2048, "overlong": "truncate"},
        "output": {"uri": "output"},
    }
    config = {"name": "prepare", "uid": "prepare", "spec": spec, "base_dir": str(folder)}
    prepare(RunConfig.model_validate(config | {"model_path": str(folder / "model"), "work": str(folder / "work")}))


def measure(folder: Path) -> Measure:
    """Runs `run` in a process of its own and watches it and its workers."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, "--run", str(folder)])
    parent = worker = 0
    while process.poll() is None:
        parent = max(parent, _peak(process.pid))
        for child in _children(process.pid):
            worker = max(worker, _peak(child))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    return Measure(time.monotonic() - start, parent, worker)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += [int(child) for child in task.read_text().split()]
    return found


def _peak(pid: int) -> int:
    """Largest resident memory so far, in KiB; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def main(sizes: list[float]) -> None:
    """Prints one line of a table for each size in gigabytes."""
    from tiny_llama import save_model  # loads torch: not at the top, which worker processes import too

    print("| file | rows | tokens | seconds | tokens/s | parent | largest worker |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder / "model", (row["messages"][1]["content"] for row in rows()))
            count = write_jsonl(folder / "rows.jsonl", int(size * 1e9))
            result = measure(folder)
            tokens = json.loads((folder / "work/prepared/data-report.json").read_text())["tokens"]
        print(
            f"| {size:g} GB | {count:,} | {tokens:,} | {result.seconds:.0f} | {tokens / result.seconds:,.0f} "
            f"| {result.parent >> 10} MiB | {result.worker >> 10} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]))
    else:
        main([float(size) for size in sys.argv[1:]] or [0.1, 1.0])
