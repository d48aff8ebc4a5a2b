"""The API server of this tier: started once for all its tests, or the one that FINETUNE_TEST_KUBECONFIG names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import require
from tests.api.cluster import Cluster, cluster, existing
from tests.api.objects import Api, fresh_namespace


@pytest.fixture(scope="session")
def api_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with KubeRay and our resource definitions."""
    folder = tmp_path_factory.mktemp("api")
    if kubeconfig := os.environ.get("FINETUNE_TEST_KUBECONFIG"):
        yield existing(Path(kubeconfig), folder)
        return
    require.tools("etcd", "kubernetes", "kuberay")
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
