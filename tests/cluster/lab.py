"""A real Kubernetes on this machine: control plane, two nodes, DNS, KubeRay, all in namespaces that end with it.

make cluster            starts one and says how to reach it, until Ctrl-C
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.api.cluster import (
    USERS,
    Cluster,
    Programs,
    apiserver_flags,
    controller_manager_flags,
    etcd_flags,
    install_ray_crds,
    is_ready,
)
from tests.api.objects import Api
from tests.cluster.network import GATEWAY, NodeNetwork, make_bridge, make_node
from tests.cluster.node import remove_cgroups, start_node
from tests.cluster.policies import Policies
from tests.cluster.system import install_system
from tests.tools.build import build

NODES: Final = 2
_PORT: Final = 6443
_ETCD_PORT: Final = 2379
_USERS: Final = {
    "system:kube-scheduler": [],
    "system:kube-proxy": ["system:node-proxier"],
    **{f"system:node:node-{index}": ["system:nodes"] for index in range(1, NODES + 1)},
}


@dataclass(frozen=True)
class Lab:
    """A running cluster with nodes, and this machine's address as its pods see it."""

    cluster: Cluster
    address: str


@contextmanager
def lab(folder: Path, images: Path, memory: str = "7Gi") -> Iterator[Lab]:
    """Starts everything with its files in `folder`; stops it when the block is left.

    Args:
        images: a containerd's root with the images that pods may use.
        memory: what the pods of one node may have.

    Raises:
        RuntimeError: a program ended by itself; the end of its log is in the message.
        TimeoutError: something did not get ready.
    """
    etcd, kubernetes, node = (build(module) for module in ("etcd", "kubernetes", "node"))
    folder.mkdir(parents=True, exist_ok=True)
    c = Cluster(
        folder=folder,
        kubeconfig=folder / "admin.kubeconfig",
        url=f"https://{GATEWAY}:{_PORT}",
        ca=folder / "certificates" / "apiserver.crt",
        _tokens={user: secrets.token_hex() for user in (*USERS, *_USERS)},
    )
    c.logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        make_bridge()
        programs = Programs(c.logs)
        stack.callback(remove_cgroups)
        stack.callback(programs.stop)
        programs.start("etcd", [etcd / "server", *etcd_flags(folder, _ETCD_PORT)])
        programs.start("kube-apiserver", [kubernetes / "kube-apiserver", *_apiserver_flags(c)])
        programs.wait(c.ca.is_file, "the certificate of kube-apiserver")
        api = stack.enter_context(Api(c.user("admin")))
        programs.wait(lambda: is_ready(api), "kube-apiserver")
        install_ray_crds(api)
        manager = c.user("system:kube-controller-manager")
        programs.start(
            "kube-controller-manager",
            [kubernetes / "kube-controller-manager", *controller_manager_flags(c, manager, ["*"])],
        )
        programs.start(
            "kube-scheduler",
            [
                node / "kube-scheduler",
                f"--kubeconfig={c.user('system:kube-scheduler')}",
                "--leader-elect=false",
                "--secure-port=0",
            ],
        )
        networks: list[NodeNetwork] = []
        for index in range(1, NODES + 1):
            networks.append(make_node(index, networks))
        for network in networks:
            start_node(c, programs, network, images, memory)
        programs.wait(lambda: len(_ready_nodes(api)) == NODES, "the nodes")
        policies = Policies(c.kubeconfig, networks)
        policies.start()
        stack.callback(policies.stop)
        install_system(api)
        yield Lab(c, GATEWAY)


def _ready_nodes(api: Api) -> list[str]:
    return [
        node["metadata"]["name"]
        for node in api.list("v1/Node")
        for condition in node["status"].get("conditions", [])
        if condition["type"] == "Ready" and condition["status"] == "True"
    ]


def _apiserver_flags(c: Cluster) -> list[str]:
    flags = apiserver_flags(c, _ETCD_PORT)
    with (c.folder / "tokens.csv").open("a") as file:
        for user, groups in _USERS.items():
            file.write(f'{c.token(user)},{user},{user},"{",".join(groups)}"\n')
    return [
        *flags,
        f"--bind-address={GATEWAY}",
        f"--advertise-address={GATEWAY}",
        "--endpoint-reconciler-type=lease",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP",
    ]
