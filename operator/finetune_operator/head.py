"""Asks the head pod of a running attempt how far it is."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp

from finetune_api.stage import PROGRESS_PORT, ProgressReport
from finetune_operator.observe import Pod, read_report

_MOST_BYTES: Final = 1 << 16


class Heads:
    """One connection pool to all heads. An answer is taken as data of a tenant: bounded, and read strictly."""

    def __init__(self, timeout: float) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout), trust_env=False)

    async def ask(self, pod: Pod) -> ProgressReport | None:
        """The head's report; None when it does not answer in time, or with something else."""
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with self._session.get(f"http://{host}:{PROGRESS_PORT}/progress", allow_redirects=False) as answer:
                if answer.status != 200:
                    return None
                return read_report(await answer.content.read(_MOST_BYTES))
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError):
            return None

    async def close(self) -> None:
        await self._session.close()
