"""A replica in a process of its own, for tests of the election: while it leads it writes a ConfigMap without a pause.

python -m tests.api.candidate KUBECONFIG NAMESPACE LEASE_SECONDS
"""

from __future__ import annotations

import asyncio
import os
import sys

from finetune_operator import logs
from finetune_operator.client import CONFIG_MAPS, ApiError, Client
from finetune_operator.election import Election, LeadershipLost
from finetune_operator.settings import Settings


async def main(kubeconfig: str, namespace: str, seconds: float) -> None:
    settings = Settings(kubeconfig=kubeconfig, operator_namespace=namespace, lease_duration=seconds, request_timeout=2)
    async with Client.connect(settings) as lease_client, Client.connect(settings) as client:
        election = Election(lease_client, settings)
        client.guard = election.guard
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(election.run())
            for number in range(4):
                tasks.create_task(write(client, election, namespace, f"{number}"))


async def write(client: Client, election: Election, namespace: str, name: str) -> None:
    await election.leading.wait()
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"written-{name}"}}
    count = 0
    while True:
        count += 1
        try:
            await client.apply(CONFIG_MAPS, namespace, f"written-{name}", body | {"data": {"count": str(count)}})
        except ApiError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    logs.set_up("console", "info")
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
    except* LeadershipLost as lost:
        print(lost.exceptions[0], file=sys.stderr, flush=True)
        os._exit(1)
