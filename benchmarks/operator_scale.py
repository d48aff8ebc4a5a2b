"""The operator at scale, on the real API server and beside the real KubeRay.

    python -m benchmarks.operator_scale            1,000 jobs at once; 10,000 at rest and 200 training
    python -m benchmarks.operator_scale --quick    100; 1,000 and 20: under two minutes

The API server, etcd, the controller manager, KubeRay, the operator, the program that plays the kubelet and this one
share the machine. README.md says what each figure is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from benchmarks.machine import machine
from benchmarks.scale.burst import Burst, burst
from benchmarks.scale.rest import Rest, rest

HERE: Final = Path(__file__).parent
MIB: Final = 1 << 20


def table(ours: Burst, kuberay: Burst, still: Rest) -> str:
    """The results as Markdown."""
    rows = [
        (f"{ours.jobs:,} created at once", "", "", ""),
        ("created within, s", f"{ours.created_seconds}", f"{kuberay.created_seconds}", ""),
        ("all started after, s", f"{ours.child_seconds}", f"{kuberay.child_seconds}", ""),
        ("jobs started/s", f"{ours.jobs_per_second:.1f}", f"{kuberay.jobs_per_second:.1f}", ""),
        ("reconciles/s", f"{ours.reconciles_per_second}", "not told", "≥ 40"),
        ("reconciles per job", f"{ours.reconciles_per_job}", "not told", ""),
        ("creation → first status, s: p50 / p99", _pair(ours.status_delay), _pair(kuberay.status_delay), ""),
        ("creation → first child, s: p50 / p99", _pair(ours.child_delay), _pair(kuberay.child_delay), ""),
        ("writes / reads per job", _requests(ours), _requests(kuberay), ""),
        ("CPU, ms per job", _cpu(ours), _cpu(kuberay), ""),
        ("peak memory, MiB", _mib(ours.peak_bytes), _mib(kuberay.peak_bytes), ""),
        (f"{still.at_rest:,} at rest, {still.training} training", "", "", ""),
        ("start until all are reconciled, s", f"{still.start_seconds}", "", ""),
        ("reconciles/s in the start", f"{still.start_reconciles_per_second}", "", "≥ 40"),
        ("resident memory, MiB", _mib(still.resident_bytes), _mib(still.kuberay_resident_bytes), "≤ 300"),
        ("peak memory, MiB", _mib(still.peak_bytes), "", "≤ 300"),
        ("CPU, share of a core", f"{still.cpu['operator']:.3f}", f"{still.cpu['KubeRay']:.3f}", ""),
        ("reconciles/s", f"{still.reconciles_per_second}", "not told", ""),
        ("requests/s", f"{still.requests_per_second}", f"{still.kuberay_requests_per_second}", ""),
        ("head's answer → status, s: p50 / p99", _pair(still.answer_delay), "", "p99 ≤ 5"),
        ("step → status, s: p50 / p99", _pair(still.step_delay), "", ""),
        ("creation → first status, s: p50 / p99", _pair(still.new_job_delay), "", "p99 ≤ 5"),
        ("a page of /metrics, s", f"{still.metrics_seconds}", "", ""),
    ]
    head = ["| | this operator | KubeRay | target |", "|---|---|---|---|"]
    lines = [
        f"| {name if mine else f'**{name}**'} | {mine} | {theirs} | {target} |" for name, mine, theirs, target in rows
    ]
    return "\n".join(head + lines)


def _pair(delay: dict[str, float]) -> str:
    return f"{delay['p50']:.2f} / {delay['p99']:.2f}"


def _requests(side: Burst) -> str:
    return f"{side.writes_per_job} / {side.reads_per_job}"


def _cpu(side: Burst) -> str:
    return f"{side.cpu_seconds / side.jobs * 1000:.1f}"


def _mib(size: int) -> str:
    return f"{size / MIB:.0f}"


@click.command()
@click.option("--quick", is_flag=True, help="100 jobs at once, 1,000 at rest and 20 training.")
@click.option("--at-once", default=1000, show_default=True, help="Jobs created at once.")
@click.option("--at-rest", default=10_000, show_default=True, help="Jobs that have ended.")
@click.option("--training", default=200, show_default=True, help="Jobs that train.")
@click.option("--seconds", default=120.0, show_default=True, help="How long the training ones are watched.")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write everything measured, as JSON.")
def main(quick: bool, at_once: int, at_rest: int, training: int, seconds: float, output: Path | None) -> None:
    """Measures, prints a table and writes all figures to benchmarks/operator_scale.json (not with --quick)."""
    if quick:
        at_once, at_rest, training, seconds = 100, 1000, 20, 30.0
    elif output is None:
        output = HERE / "operator_scale.json"
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="operator-scale-") as folder:
        ours, kuberay = burst(Path(folder) / "burst", at_once)
        click.echo(f"started {at_once:,} jobs in {ours.child_seconds} s", err=True)
        still = rest(Path(folder) / "rest", at_rest, training, seconds)
    where = f"{machine('aiohttp', 'pydantic')}; load {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    click.echo(f"{where}\n")
    click.echo(table(ours, kuberay, still))
    if output:
        whole = {
            "command": "python -m benchmarks.operator_scale " + " ".join(sys.argv[1:]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": where,
            "atOnce": {"operator": asdict(ours), "KubeRay": asdict(kuberay)},
            "atRest": asdict(still),
        }
        output.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
