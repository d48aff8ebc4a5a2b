"""`make cluster`: a cluster with the service in it, and a shell whose kubectl reaches it; gone when the shell ends."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tests.api.objects import Api
from tests.cluster.lab import lab
from tests.cluster.service import service
from tests.tools.build import ROOT, build


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (
            lab(folder / "lab", Path(os.environ["FINETUNE_LAB_IMAGES"])) as running,
            Api(running.cluster.kubeconfig) as api,
            service(running, api, folder) as installed,
        ):
            path = f"{build('kubernetes')}:{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
            environment = os.environ | {"KUBECONFIG": str(running.cluster.kubeconfig), "PATH": path}
            print(f"kubectl get nodes; the team's namespace is {installed.namespace}, its bucket {installed.bucket}")
            subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=environment, check=False)


if __name__ == "__main__":
    main()
