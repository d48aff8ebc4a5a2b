"""The API server of this tier: started once for all its tests, or the one that FINETUNE_TEST_KUBECONFIG names."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.cluster import Cluster, cluster, existing
from tests.api.objects import Api, fresh_namespace
from tests.tools.build import build


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with KubeRay and our resource definitions."""
    folder = tmp_path_factory.mktemp("api")
    if kubeconfig := os.environ.get("FINETUNE_TEST_KUBECONFIG"):
        yield existing(Path(kubeconfig), folder)
        return
    for module in ("etcd", "kubernetes", "kuberay"):
        try:
            build(module)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            message = f"tests/tools/{module} does not build: {error}"
            if os.environ.get("FINETUNE_CI") == "1":
                pytest.fail(message)
            pytest.skip(message)
    with cluster(folder) as c:
        yield c


@pytest.fixture(scope="session")
def local_cluster(api_cluster: Cluster) -> Cluster:
    """The cluster, for a test that needs its audit log, its users or a KubeRay that asks the test for dashboards."""
    if not api_cluster.local:
        pytest.skip("needs this tier's own API server: unset FINETUNE_TEST_KUBECONFIG")
    return api_cluster


@pytest.fixture(scope="session")
def api(api_cluster: Cluster) -> Iterator[Api]:
    """The API server as its admin."""
    with Api(api_cluster.kubeconfig) as api:
        yield api


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """A namespace of the test's own, in which pods can be made; deleted afterwards, which nobody waits for."""
    with fresh_namespace(api) as name:
        yield name
