"""Tools of this tier: a machine that cannot build them skips its tests, continuous integration may not."""

from __future__ import annotations

import pytest

from tests import require


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    require.tools("helm", "kube-score", "prometheus-operator")
