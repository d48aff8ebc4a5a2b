"""The cluster of this tier: the lab, started once; it needs namespaces of its own, which `make e2e` gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.cluster import Cluster
from tests.api.objects import Api, fresh_namespace
from tests.cluster.lab import Lab, lab
from tests.cluster.service import Service, service


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A cluster with two nodes, DNS, KubeRay and the images; or another one: see docs/contributing.md."""
    folder = tmp_path_factory.mktemp("lab")
    if kubeconfig := os.environ.get("FINETUNE_TEST_KUBECONFIG"):
        yield Lab(Cluster(folder, Path(kubeconfig), local=False), os.environ["FINETUNE_TEST_ADDRESS"])
        return
    images = os.environ.get("FINETUNE_LAB_IMAGES")
    if images is None:
        pytest.skip("needs root and namespaces of its own: make e2e")
    with lab(folder, Path(images)) as found:
        yield found


@pytest.fixture(scope="session")
def api(running: Lab) -> Iterator[Api]:
    """The API server as its admin."""
    with Api(running.cluster.kubeconfig) as api:
        yield api


@pytest.fixture(scope="session")
def installed(running: Lab, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, with object storage and a namespace for a team."""
    with service(running, api, tmp_path_factory.mktemp("service")) as found:
        yield found


@pytest.fixture(scope="session")
def long_job(installed: Service) -> Iterator[str]:
    """A job that trains for longer than the tests take, past its first checkpoint."""
    name = "long"
    installed.submit_long(name, 100_000)
    yield name
    installed.remove(name)


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """A namespace of the test's own, deleted afterwards."""
    with fresh_namespace(api) as name:
        yield name
