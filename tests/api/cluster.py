"""A Kubernetes API on loopback with the real parts and no nodes: `with cluster(folder) as c: …`.

etcd, kube-apiserver (RBAC, an audit log), kube-controller-manager and the KubeRay manager, with KubeRay's and our
resource definitions. Pods are made and never run: a test plays the kubelet. Nothing needs root or a network.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import urllib3

from tests.api.objects import Api, Object, Refused, eventually
from tests.ports import free_port
from tests.tools.build import build

CRDS: Final = Path(__file__).parents[2] / "manifests" / "crds"
# Who may talk to the API server, by name, with their groups. Rights come from what a test binds to a name or a group.
USERS: Final[Mapping[str, Sequence[str]]] = {
    "admin": ["system:masters"],
    "kuberay": ["system:masters"],
    "system:kube-controller-manager": [],
    "operator-0": ["finetune-operators"],
    "operator-1": ["finetune-operators"],
    "tenant": [],
    "stranger": [],
}
RAY_PLURALS: Final = ("rayclusters", "rayjobs", "rayservices")  # without any of these KubeRay does not start
# Those that act on what is here. The node lifecycle controller would call a test's nodes dead after 40 s without a
# lease renewed, and the endpoint controllers may not take loopback addresses.
CONTROLLERS: Final = (
    "clusterrole-aggregation-controller",
    "disruption-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "pod-garbage-collector-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "taint-eviction-controller",
    "ttl-after-finished-controller",
)
_RECORDED: Final = (
    ("", ["configmaps"]),
    ("batch", ["jobs"]),
    ("networking.k8s.io", ["networkpolicies"]),
    ("ray.io", ["rayjobs", "rayclusters"]),
)
# Before a command: it ends with this process, which could be killed and then stop nothing.
TIED: Final = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
_START_SECONDS: Final = 120  # on a busy machine; 6 s is usual on two cores


@dataclass
class Cluster:
    """A running API server. `audit_log` and users other than admin are there only if it is `local`."""

    folder: Path
    kubeconfig: Path  # of admin
    local: bool = True
    url: str = ""
    ca: Path = Path()
    ray_proxy_port: int = 0  # KubeRay asks for its dashboards' URLs here, as an HTTP proxy: who plays kubelet listens
    _tokens: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def logs(self) -> Path:
        """Folder with one log for each program."""
        return self.folder / "logs"

    @property
    def audit_log(self) -> Path:
        """One JSON object a line for each answered request: `user.username`, `userAgent`, `verb`, `requestURI`…"""
        return self.folder / "audit.jsonl"

    def audited(self) -> list[Object]:
        """The audit log up to now; a request that was dropped before anyone knew whose it was is left out."""
        lines = self.audit_log.read_bytes().splitlines(keepends=True)
        events = (json.loads(line) for line in lines if line.endswith(b"\n"))
        return [event for event in events if "username" in event["user"]]

    def token(self, user: str) -> str:
        """The bearer token of one of USERS."""
        return self._tokens[user]

    def user(self, user: str) -> Path:
        """Kubeconfig of one of USERS."""
        return self._write_kubeconfig(user.replace(":", "-"), self.token(user))

    def service_account(self, namespace: str, name: str) -> Path:
        """Kubeconfig of a service account that is there, with a token of an hour."""
        with Api(self.kubeconfig) as api:
            where = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
            answer = api.request("POST", where, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"})
        return self._write_kubeconfig(f"{namespace}-{name}", answer["status"]["token"])

    def _write_kubeconfig(self, name: str, token: str) -> Path:
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}
                    ],
                    "users": [{"name": name, "user": {"token": token}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
                    "current-context": "test",
                }
            )
        )
        path.chmod(0o600)
        return path


@contextmanager
def cluster(folder: Path, *, ray: bool = True) -> Iterator[Cluster]:
    """Starts everything with its files in `folder`, which is made; stops it when the block is left.

    Without `ray` there is neither KubeRay nor its resource definitions, until `install_ray_crds`.

    Enter it in a thread that outlives the block: Linux ends the programs with the thread that started them.

    Raises:
        RuntimeError: a program ended by itself; the end of its log is in the message.
        TimeoutError: something did not get ready.
    """
    etcd, kubernetes, kuberay = (build(module) for module in ("etcd", "kubernetes", "kuberay"))
    folder.mkdir(parents=True, exist_ok=True)
    etcd_port, port, ray_proxy_port = free_port(), free_port(), free_port()
    c = Cluster(
        folder=folder,
        kubeconfig=folder / "admin.kubeconfig",
        url=f"https://127.0.0.1:{port}",
        ca=folder / "certificates" / "apiserver.crt",
        ray_proxy_port=ray_proxy_port,
        _tokens={user: secrets.token_hex() for user in USERS},
    )
    c.logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        programs = Programs(c.logs)
        stack.callback(programs.stop)
        programs.start("etcd", [etcd / "server", *etcd_flags(folder, etcd_port)])
        programs.start("kube-apiserver", [kubernetes / "kube-apiserver", *apiserver_flags(c, etcd_port)])
        programs.wait(c.ca.is_file, "the certificate of kube-apiserver")
        api = stack.enter_context(Api(c.user("admin")))
        programs.wait(lambda: is_ready(api), "kube-apiserver")
        # Before kube-controller-manager: its garbage collector looks for new kinds every 30 s only.
        if ray:
            install_ray_crds(api)
        install_crds(api, sorted(CRDS.glob("*.yaml")))
        manager = c.user("system:kube-controller-manager")
        programs.start(
            "kube-controller-manager", [kubernetes / "kube-controller-manager", *controller_manager_flags(c, manager)]
        )
        if ray:
            programs.start("kuberay", [kuberay / "ray-operator", *KUBERAY_FLAGS], _kuberay_environment(c))
        # Its first deed in a namespace: now it reconciles.
        programs.wait(lambda: api.find("v1/ServiceAccount", "default", "default"), "kube-controller-manager")
        yield c


def existing(kubeconfig: Path, folder: Path) -> Cluster:
    """A cluster that somebody else runs, with KubeRay in it; our resource definitions are brought up to date."""
    with Api(kubeconfig) as api:
        api.get("apiextensions.k8s.io/v1/CustomResourceDefinition", "rayjobs.ray.io")
        install_crds(api, sorted(CRDS.glob("*.yaml")))
        return Cluster(folder, kubeconfig, local=False, url=api.url)


def install_ray_crds(api: Api) -> None:
    """Applies KubeRay's resource definitions."""
    folder = build("kuberay")
    install_crds(api, [folder / f"ray.io_{plural}.yaml" for plural in RAY_PLURALS])


def install_crds(api: Api, files: Sequence[Path]) -> None:
    """Applies resource definitions, as text since some are large, and returns when they are served."""
    names = [file.stem.split("_") for file in files]  # controller-gen and we call these files GROUP_PLURAL.yaml
    for file, (group, plural) in zip(files, names, strict=True):
        kind = "apiextensions.k8s.io/v1/CustomResourceDefinition"
        api.apply_text(kind, f"{plural}.{group}", file.read_text())
    for group, plural in names:
        eventually(partial(api.serves, group, plural), f"{plural}.{group} to be served")


class Programs:
    """Programs in the order of their start."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        with (self._logs / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [*TIED, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._logs.parent,
                env={"HOME": str(self._logs.parent), "PATH": os.defpath, **(environment or {})},
            )

    def wait(self, ready: Callable[[], object], what: str) -> None:
        """Returns when `ready()` is true; fails as soon as a program has ended."""

        def ask() -> object:
            for name, program in self._running.items():
                if program.poll() is not None:
                    end = (self._logs / f"{name}.log").read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"{name} ended with {program.returncode}:\n{end}")
            return ready()

        eventually(ask, what, _START_SECONDS)

    def stop(self) -> None:
        # Nothing of theirs is kept, and a polite kube-apiserver would wait for every watch.
        for program in self._running.values():
            program.kill()
        for program in self._running.values():
            program.wait()


def is_ready(api: Api) -> bool:
    """Whether the API server serves."""
    try:
        return bool(api.request("GET", "/readyz")["text"] == "ok")
    except (Refused, urllib3.exceptions.HTTPError):
        return False


def etcd_flags(folder: Path, port: int) -> list[str]:
    """An etcd on loopback that may lose what it has been told."""
    return [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        "--listen-peer-urls=http://127.0.0.1:0",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_flags(c: Cluster, etcd_port: int) -> list[str]:
    """An API server on loopback; of a flag that stands twice the later one counts."""
    tokens, policy = c.folder / "tokens.csv", c.folder / "audit-policy.json"
    with tokens.open("w", newline="") as file:
        csv.writer(file).writerows([c.token(user), user, user, ",".join(groups)] for user, groups in USERS.items())
    tokens.chmod(0o600)
    # What is made, with its content, but for what is secret; of all else who did it and how it ended.
    made = {"level": "Request", "verbs": ["create"], "resources": [{"group": g, "resources": r} for g, r in _RECORDED]}
    rules = {"rules": [made, {"level": "Metadata"}], "omitStages": ["RequestReceived"]}
    policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy"} | rules))
    key = c.ca.with_suffix(".key")  # made beside the certificate at the start, and good for service accounts too
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        "--bind-address=127.0.0.1",
        f"--secure-port={c.url.rpartition(':')[2]}",
        # Loopback may not be an endpoint of the service `kubernetes`; nothing here needs one.
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        f"--cert-dir={c.ca.parent}",
        "--authorization-mode=Node,RBAC",
        # As on OpenShift: who says that a child blocks its owner's deletion needs a right on the owner's finalizers.
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
        f"--token-auth-file={tokens}",
        f"--audit-log-path={c.audit_log}",
        f"--audit-policy-file={policy}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--allow-privileged=true",
        "--profiling=false",
    ]


def controller_manager_flags(c: Cluster, kubeconfig: Path, controllers: Sequence[str] = CONTROLLERS) -> list[str]:
    """A controller manager with these controllers."""
    return [
        f"--kubeconfig={kubeconfig}",
        f"--controllers={','.join(controllers)}",
        "--secure-port=0",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={c.ca.with_suffix('.key')}",
        f"--root-ca-file={c.ca}",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--profiling=false",
    ]


KUBERAY_FLAGS: Final = (
    "-enable-leader-election=false",
    "-metrics-addr=0",
    "-health-probe-bind-address=0",
    "-reconcile-concurrency=10",  # 1 by default, which serves one job after another
    "-qps=500",
    "-burst=1000",
)


def _kuberay_environment(c: Cluster) -> dict[str, str]:
    # A dashboard is http://<service>.<namespace>.svc.cluster.local:8265. There is no DNS here, and the API server
    # proxies to no loopback address: so KubeRay is given an HTTP proxy, at which the test answers.
    proxy = f"http://127.0.0.1:{c.ray_proxy_port}"
    return {"KUBECONFIG": str(c.user("kuberay")), "HTTP_PROXY": proxy, "NO_PROXY": "127.0.0.1"}
