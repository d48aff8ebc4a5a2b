"""The release changes under a job that trains: upgrade from the chart of the commit before, rollback, uninstall."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.chart.helm import CHART
from tests.cluster.service import JOB, OPERATOR_NAMESPACE, Service
from tests.tools.build import ROOT


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as it was before the last commit that changed it."""
    folder = str(CHART.relative_to(ROOT))
    commits = _git("log", "--format=%H", "-2", "--", folder).decode().split()
    assert len(commits) == 2, f"two commits that changed {folder} are needed: git fetch --unshallow"
    scratch = tmp_path_factory.mktemp("previous")
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commits[1], folder))) as tar:
        tar.extractall(scratch, filter="data")
    return scratch / folder


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


@pytest.fixture(scope="module")
def training(installed: Service, long_job: str) -> set[str]:
    """UIDs of the pods that train, before anything happens."""
    return installed.uids(long_job)


def _goes_on(installed: Service, name: str) -> None:
    """Waits until an operator has written a step that was trained after now."""
    step = installed.status(name)["progress"]["step"]
    installed.wait(name, lambda status: status["progress"]["step"] > step + 50, 120)


def test_an_upgrade_and_a_rollback_leave_training_alone(
    installed: Service, long_job: str, training: set[str], previous: Path
) -> None:
    installed.install(previous)
    _goes_on(installed, long_job)
    installed.install()
    _goes_on(installed, long_job)
    installed.helm("rollback", "--wait", given=False)
    _goes_on(installed, long_job)
    assert installed.uids(long_job) == training
    assert installed.status(long_job)["attempt"] == 1


def test_an_uninstall_leaves_jobs_pods_and_data_and_an_install_takes_them_over(
    installed: Service, long_job: str, training: set[str]
) -> None:
    installed.helm("uninstall", "--wait", given=False)
    assert not installed.api.list("apps/v1/Deployment", OPERATOR_NAMESPACE)
    assert installed.api.get(JOB, long_job, installed.namespace)["status"]["phase"] == "Training"
    assert installed.uids(long_job) == training
    installed.install()
    installed.install()
    _goes_on(installed, long_job)
    assert installed.uids(long_job) == training
    installed.plugin("suspend", long_job)
    status = installed.phase(long_job, "Suspended", "Failed", seconds=180)
    assert (status["phase"], status["attempt"]) == ("Suspended", 1), status
    assert status["checkpoint"]["step"] >= status["progress"]["step"] - 50
