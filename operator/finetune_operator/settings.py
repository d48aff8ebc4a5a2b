"""What an admin can set on the operator. `command.py` fills it from flags and the environment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The operator's settings; durations are seconds. The defaults are those of the command line."""

    kubeconfig: str | None = None  # None: the pod's service account, else $KUBECONFIG, else ~/.kube/config
    context: str | None = None
    namespaces: tuple[str, ...] = ()  # of the jobs; empty: all
    operator_namespace: str = "finetune-system"  # where the operator and its ConfigMaps live
    leader_elect: bool = True
    lease_namespace: str = ""  # empty: operator_namespace
    lease_name: str = "finetune-operator"
    lease_identity: str = ""  # empty: host name and a random part
    lease_duration: float = 15
    metrics_bind_address: str = ":8080"
    health_bind_address: str = ":8081"
    scraper_namespaces: tuple[str, ...] = ()  # whose pods may read the metrics of trainings, besides the operator's
    probe_address: str = ""  # HOST:PORT here that trainings should not reach, and ask; empty: they ask nothing
    concurrency: int = 16
    log_format: str = "json"
    log_level: str = "info"
    progress_interval: float = 10
    progress_timeout: float = 3
    progress_deadline: float = 60 * 60
    start_deadline: float = 30 * 60
    stop_grace: float = 120
    request_timeout: float = 10

    @property
    def renew_deadline(self) -> float:
        """How long a leader goes on after the last renewal that it knows of; the rest of the lease is margin."""
        return self.lease_duration * 2 / 3

    @property
    def retry_period(self) -> float:
        """Time between two tries to get or renew the lease."""
        return self.lease_duration * 2 / 15
