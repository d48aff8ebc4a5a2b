"""A real Prometheus that scrapes what a test runs: `with prometheus(folder, targets) as server: server.query("up")`."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import urllib3
import yaml

from tests import require
from tests.api.cluster import TIED
from tests.api.objects import eventually
from tests.ports import free_port

SCRAPE_SECONDS: Final = 1


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query, now.

        Raises:
            AssertionError: Prometheus does not understand it.
        """
        return list(self._get("query", query=expression)["result"])

    def series(self, expression: str, legend: str, seconds: int) -> list[tuple[str, list[float], list[float]]]:
        """Of the last `seconds`, each series with its legend, times (Unix seconds) and values."""
        end = time.time()
        fields = {"query": expression, "start": f"{end - seconds}", "end": f"{end}", "step": "1"}
        return [
            (
                named(legend, each["metric"]),
                [float(at) for at, _ in each["values"]],
                [float(v) for _, v in each["values"]],
            )
            for each in self._get("query_range", **fields)["result"]
        ]

    def rules(self) -> list[dict[str, Any]]:
        """The alerting rules as they were evaluated last."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **fields: str) -> dict[str, Any]:
        answer = urllib3.request("GET", f"{self.url}/api/v1/{what}", fields=fields, timeout=10).json()
        assert answer["status"] == "success", f"{fields}: {answer}"
        return dict(answer["data"])


@contextmanager
def prometheus(
    folder: Path, targets: Mapping[int, Mapping[str, str]], rule_files: Sequence[Path] = ()
) -> Iterator[Prometheus]:
    """A server with its data in `folder`.

    Args:
        targets: labels of what is scraped, by its port on loopback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = f"{SCRAPE_SECONDS}s"
    jobs = [
        {
            "job_name": f"port-{port}",
            "honor_labels": True,
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": dict(labels)}],
        }
        for port, labels in targets.items()
    ]
    settings = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(path) for path in rule_files],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [
        *TIED,
        require.program("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        eventually(lambda: _ready(server.url), "Prometheus", 60, (folder / "prometheus.log").read_text)
        yield server
    finally:
        process.kill()
        process.wait()


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with labels put in, as Grafana does: `{{phase}}`."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def _ready(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/-/ready", timeout=2, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False
