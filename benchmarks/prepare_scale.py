"""Cost of preparing a token as the data grows: one machine's processes against Ray Data on the same machine.

    python benchmarks/prepare_scale.py [--on one,ray] [GIGABYTES ...]

Rows are those of prepare_memory.py. CPU seconds are of the process and all that it started, Ray's own among them; on a
machine that others use too they say more than seconds do. Memory is the highest that a process had resident; Ray's
shared store, which every process maps, is not in it. Everything is in a temporary folder (about five times the file; it
is refused when the disk has less than eight times) and is deleted. The shards of both are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from prepare_memory import write_jsonl
from stdlib_chat import rows

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Measure:
    """One run: wall-clock and CPU seconds, and resident bytes of the driver and of the largest other process."""

    seconds: float
    cpu: float
    driver: int
    worker: int


def run(folder: Path, on: str) -> None:
    """Prepares `folder`/rows.jsonl into `folder`/work."""
    from finetune_api.run import RunConfig
    from finetune_trainer.prepare import prepare

    spec = {
        "model": {"source": "model"},
        "data": {
            "train": [{"uri": "rows.jsonl"}],
            "sequenceLength": 2048,
            "overlong": "truncate",
            "prepare": {"workers": 2 if on == "ray" else 1},
        },
        "output": {"uri": "output"},
    }
    config = {"name": "prepare", "uid": "prepare", "spec": spec, "base_dir": str(folder)}
    started: dict[str, float] = {}

    def progress(done: float, total: float, what: str) -> None:
        started.setdefault(what, time.monotonic())

    prepare(
        RunConfig.model_validate(config | {"model_path": str(folder / "model"), "work": str(folder / "work")}), progress
    )
    ends = [*list(started.values())[1:], time.monotonic()]
    parts = [f"{what} {end - begin:.0f} s" for (what, begin), end in zip(started.items(), ends, strict=True)]
    print(f"    {on}: {', '.join(parts)}", file=sys.stderr, flush=True)


def measure(folder: Path, on: str) -> Measure:
    """Runs `run` in a process of its own and watches it and all that it starts."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, "--run", on, str(folder)])
    cpu: dict[int, float] = {}
    peaks: dict[int, int] = {}
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for each in family:
            try:
                memory, times = each.memory_info(), each.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu[each.pid] = times.user + times.system
            peaks[each.pid] = max(peaks.get(each.pid, 0), memory.rss - memory.shared)
        time.sleep(SAMPLE_SECONDS)
    if process.wait():
        raise SystemExit(f"prepare ended with {process.returncode}")
    driver = peaks.pop(process.pid, 0)
    return Measure(time.monotonic() - start, sum(cpu.values()), driver, max(peaks.values(), default=0))


def main(sizes: list[float], ways: list[str]) -> None:
    """Prints one line of a table for each size and way."""
    from tiny_llama import save_model  # loads torch: not at the top, which worker processes import too

    print("| file | on | tokens | seconds | CPU s | CPU µs a token | driver | largest worker |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        if shutil.disk_usage(tempfile.gettempdir()).free < 8e9 * size:
            raise SystemExit(f"the disk has no room for {size:g} GB")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder / "model", (row["messages"][1]["content"] for row in rows()))
            write_jsonl(folder / "rows.jsonl", int(size * 1e9))
            shards = set()
            for on in ways:
                result = measure(folder, on)
                prepared = folder / "work" / "prepared"
                tokens = json.loads((prepared / "data-report.json").read_text())["tokens"]
                shards.add(hashlib.sha256((prepared / "manifest.json").read_bytes()).hexdigest())
                shutil.rmtree(folder / "work")
                print(
                    f"| {size:g} GB | {on} | {tokens:,} | {result.seconds:.0f} | {result.cpu:.0f} "
                    f"| {result.cpu / tokens * 1e6:.2f} | {result.driver >> 20} MiB | {result.worker >> 20} MiB |",
                    flush=True,
                )
            assert len(shards) == 1, "the shards differ"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[3]), sys.argv[2])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--on", default="one,ray")
        parser.add_argument("sizes", type=float, nargs="*", default=[0.1, 1.0])
        arguments = parser.parse_args()
        main(arguments.sizes, arguments.on.split(","))
