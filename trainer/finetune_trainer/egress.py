"""What a worker pod can reach that no training needs: asked at its start, so that nobody has to believe a policy."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from finetune_api.stage import PROBE_VARIABLE
from finetune_api.status import DESTINATIONS, Destination, EgressResult
from finetune_trainer.reporter import Event, Reporter

SECONDS: Final = 3.0
Address = tuple[str, int]

# By number, so that DNS need not work, and a server that has answered there for years.
_INTERNET: Final[Address] = ("1.1.1.1", 443)
_METADATA: Final[Address] = ("169.254.169.254", 80)  # gives out a node's credentials, on every large cloud


def ask_beside(reporter: Reporter, found: Mapping[Destination, Address]) -> None:
    """Asks in a thread of its own and reports it as event `egress`; training waits for nothing."""
    if found:
        threading.Thread(target=lambda: reporter.event(_event(ask(found))), name="egress", daemon=True).start()


def destinations(environment: Mapping[str, str]) -> dict[Destination, Address]:
    """The addresses that a pod with this environment asks; none where the operator did not tell it to."""
    if not environment.get(PROBE_VARIABLE):
        return {}
    named: dict[Destination, Address | None] = {
        "internet": _INTERNET,
        "metadata": _METADATA,
        "apiServer": _address(environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")),
        "otherNamespace": _address(*environment[PROBE_VARIABLE].rpartition(":")[::2]),
    }
    return {to: address for to, address in named.items() if address is not None}


def _address(host: str | None, port: str | None) -> Address | None:
    return (host.strip("[]"), int(port)) if host and port and port.isdecimal() else None


def ask(found: Mapping[Destination, Address], seconds: float = SECONDS) -> list[EgressResult]:
    """Whether a TCP connection to each address can be made, all tried at once; returns after `seconds` at the latest.

    Silence, no route and a refusal are the same: some network plugins refuse what a policy forbids. A name that cannot
    be looked up says nothing about its address, which is left out.
    """
    answers: dict[Destination, bool] = {}
    end = time.monotonic() + seconds
    # Not a pool: the process would wait for its threads at the end.
    threads = [threading.Thread(target=_try, args=(to, found[to], seconds, answers), daemon=True) for to in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [
        EgressResult(to=to, address=f"{host}:{port}", reached=answers[to])
        for to, (host, port) in found.items()
        if to in answers
    ]


def _try(to: Destination, address: Address, seconds: float, answers: dict[Destination, bool]) -> None:
    try:
        (family, kind, protocol, _, numeric), *_ = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    answers[to] = False
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(numeric)
        except OSError:
            return
    answers[to] = True


def _event(found: Sequence[EgressResult]) -> Event:
    print(f"egress: {sentence(found)}", flush=True)
    return {"event": "egress", "time": time.time(), "asked": [each.model_dump(mode="json") for each in found]}


def asked(events: Iterable[Event]) -> list[EgressResult]:
    """What was found in all pods and attempts: what one of them reached, the job could reach."""
    found: dict[str, EgressResult] = {}
    for event in events:
        if event["event"] == "egress":
            for each in map(EgressResult.model_validate, event["asked"]):
                if each.to not in found or not found[each.to].reached:
                    found[each.to] = each
    return [found[to] for to in DESTINATIONS if to in found]


def sentence(found: Sequence[EgressResult]) -> str:
    """What became of it, for people."""
    if reached := [f"{DESTINATIONS[each.to]} ({each.address})" for each in found if each.reached]:
        return (
            f"Reached: {', '.join(reached)}. The runtime's networkPolicy is off or allows it, or the cluster's network "
            "plugin does not enforce NetworkPolicies."
        )
    return f"None of {len(found)} addresses that no training needs was reached."
