"""The cluster's functions of prepare in this process, one after the other: where Ray itself is not the matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.prepare import Opener
from finetune_trainer.prepare.cluster import machine, parts
from finetune_trainer.prepare.cluster.exchange import Exchange
from finetune_trainer.prepare.cluster.machine import Grain, RayMachine
from finetune_trainer.prepare.cluster.opening import folder
from finetune_trainer.prepare.machine import Machine
from finetune_trainer.prepare.work import Settings, Worker

FINE = Grain(piece_bytes=2_000, chunks=1, keys=500)


def on_cluster(grain: Grain, exchange: Callable[[Path], Exchange] = folder) -> Opener:
    """Opens the cluster that is there; `exchange` is given the spill folder."""

    @contextmanager
    def opener(settings: Settings, partial: Path, spill: Path) -> Iterator[Machine]:
        yield RayMachine(settings, exchange(spill), folder(partial), grain)

    return opener


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process stand for the cluster."""

    def spread(function: Any, arguments: Any, tick: Any) -> Iterator[Any]:
        yield from (function(*each) for each in arguments)

    def tokenised(cuts: Any, settings: Any, exchange: Any, chunks: int, tick: Any) -> Iterator[Any]:
        worker = Worker(settings)
        for number, (index, file, piece, known) in enumerate(cuts):
            for bundle in parts.bundles(str(number), index, file, piece, known, chunks):
                yield parts.tokenise(worker, bundle, exchange)

    monkeypatch.setattr(machine, "spread", spread)
    monkeypatch.setattr(machine, "tokenised", tokenised)
