"""The probe tells an address that answers from one that does not, and what any pod reached counts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_api.stage import PROBE_VARIABLE
from finetune_api.status import EgressResult
from finetune_trainer.egress import ask, ask_beside, asked, destinations, sentence
from finetune_trainer.reporter import Event
from tests.ports import free_port

CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
SEALED = [
    EgressResult(to="internet", address="1.1.1.1:443", reached=False),
    EgressResult(to="apiServer", address="10.96.0.1:443", reached=False),
]


@contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """An address that takes no connection and refuses none: its queue is full, as a dropped packet looks from afar."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()


def test_an_address_counts_as_reached_when_a_connection_is_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = ask({"apiServer": server.getsockname(), "otherNamespace": ("127.0.0.1", free_port())})
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert found[0] == EgressResult(to="apiServer", address=address, reached=True)
    assert not found[1].reached, "plugins that refuse what a policy forbids are no leak"


def test_silence_is_waited_for_no_longer_than_said() -> None:
    with silent() as address:
        found = ask({"internet": address, "metadata": address}, seconds=0.3)
    assert [each.reached for each in found] == [False, False]


def test_a_name_that_nobody_knows_says_nothing_of_what_it_stands_for() -> None:
    assert ask({"otherNamespace": ("x" * 64, 80)}) == []


def test_a_pods_environment_names_what_is_asked() -> None:
    found = destinations(CLUSTER | {PROBE_VARIABLE: "finetune-operator.finetune-system.svc:8081"})
    assert found["apiServer"] == ("10.96.0.1", 443)
    assert found["otherNamespace"] == ("finetune-operator.finetune-system.svc", 8081)
    assert destinations({PROBE_VARIABLE: "[fd00::7]:8081"})["otherNamespace"] == ("fd00::7", 8081)
    assert destinations({PROBE_VARIABLE: "nonsense"}).keys() == {"internet", "metadata"}


class Kept:
    """A reporter that says when it was told something."""

    def __init__(self) -> None:
        self.told, self.events = threading.Event(), list[Event]()

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.told.set()


def test_a_pod_asks_beside_its_work() -> None:
    kept = Kept()
    with silent() as address, socket.create_server(("127.0.0.1", 0)) as server:
        ask_beside(kept, {"internet": address, "apiServer": server.getsockname()})
        assert kept.events == [], "it does not wait for the answers"
        assert kept.told.wait(30)
    assert [each.reached for each in asked(kept.events)] == [False, True]


def test_a_pod_of_somebody_elses_asks_nothing() -> None:
    """`finetune run` in a notebook of a cluster, say."""
    assert destinations(CLUSTER) == {}
    kept = Kept()
    ask_beside(kept, {})
    assert not kept.told.wait(0.1)


def test_what_one_pod_reached_once_the_job_could_reach() -> None:
    def event(*found: EgressResult) -> Event:
        return {"event": "egress", "time": 1.0, "asked": [each.model_dump(mode="json") for each in found]}

    open_one = SEALED[1].model_copy(update={"reached": True})
    events = [event(*SEALED), {"event": "step"}, event(open_one), event(*reversed(SEALED))]
    assert asked(events) == [SEALED[0], open_one]
    assert asked([{"event": "step"}]) == []


def test_the_sentence_names_what_was_reached() -> None:
    assert sentence(SEALED) == "None of 2 addresses that no training needs was reached."
    reached = [each.model_copy(update={"reached": True}) for each in SEALED]
    assert "the internet (1.1.1.1:443), the API server (10.96.0.1:443)" in sentence(reached)
