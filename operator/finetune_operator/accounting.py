"""What a job has cost, and where the time of its nodes went: counted forward from what is in its status already.

Cost is devices × held time × price: from the moment a pod is given its node until its containers have ended. Counting
starts where the last one stopped (`status.accounted`), so a restarted operator neither forgets nor counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.runtime import Accelerator
from finetune_api.stage import ProgressReport, SpentSeconds
from finetune_api.status import Accounted, Cost, FinetuneJobStatus, Goodput, LostSeconds
from finetune_operator.observe import Pod, format_time, parse_time

Cause = Literal["startup", "checkpoint", "preemption", "failure", "finish"]

SECONDS_PER_HOUR: Final = 3600.0


@dataclass(frozen=True)
class Account:
    """The figures of a status that are counted here."""

    cost: Cost | None
    goodput: Goodput | None
    accounted: Accounted | None


def account(
    status: FinetuneJobStatus,
    pods: Sequence[Pod],
    accelerator: Accelerator | None,
    report: ProgressReport | None,
    cause: Cause,
    now: float,
) -> Account:
    """Counts from the status's figures up to `now`.

    Args:
        pods: the training pods that are there; those of ended attempts still hold their nodes.
        accelerator: for the price; None, or one without price: no cost.
        report: newest report of the attempt `status.attempt`.
        cause: what held time that the report does not explain is lost to.
    """
    attempt, now = status.attempt or 0, float(int(now))  # whole seconds: the time is kept as such
    if not pods and status.accounted is None:
        return Account(status.cost, status.goodput, None)
    before = status.accounted or Accounted(time=format_time(min(_start(pod, now) for pod in pods)))
    start = min(parse_time(before.time) or now, now)
    devices = sum(pod.gpus * _overlap(pod, start, now) for pod in pods)
    price = accelerator.price_per_hour if accelerator else None
    spent = before.spent + devices * (price or 0.0) / SECONDS_PER_HOUR
    book, goodput = _spend(before, status.goodput, attempt, _held(pods, start, now), report, cause)
    if devices == 0 and book == before:
        return Account(status.cost, status.goodput, status.accounted)
    cost = None
    if accelerator and price is not None:
        gpus = sum(pod.gpus for pod in pods if pod.live and pod.scheduled is not None)
        ahead = report.eta * gpus * price / SECONDS_PER_HOUR if report and report.eta is not None else None
        projected = None if ahead is None else round(spent + ahead, 2)
        cost = Cost(currency=accelerator.currency, spent=round(spent, 2), projected=projected)
    accounted = book.model_copy(update={"time": format_time(now), "spent": round(spent, 6)})
    return Account(cost or status.cost, goodput, accounted)


def lose(goodput: Goodput | None, report: ProgressReport | None, cause: Cause) -> Goodput | None:
    """After an attempt failed: its steps since the last checkpoint did not count."""
    if goodput is None or report is None:
        return goodput
    redone = min(report.seconds.at_risk, goodput.training_seconds)
    lost = goodput.lost_seconds
    return Goodput(
        training_seconds=goodput.training_seconds - redone,
        lost_seconds=lost.model_copy(update={cause: getattr(lost, cause) + redone}),
    )


def _spend(
    before: Accounted,
    goodput: Goodput | None,
    attempt: int,
    held: float,
    report: ProgressReport | None,
    cause: Cause,
) -> tuple[Accounted, Goodput]:
    """The book of the attempt after `held` more seconds, and the goodput of all attempts with it."""
    goodput = goodput or Goodput(training_seconds=0.0)
    if before.attempt != attempt:
        before = Accounted(time=before.time, spent=before.spent, attempt=attempt)
    told = report.seconds if report and report.attempt == attempt else SpentSeconds()
    parts = {name: max(getattr(before, name), getattr(told, name)) for name in ("training", "checkpoint", "finish")}
    total = before.held + held
    other = max(0.0, total - sum(parts.values()))
    book = before.model_copy(update={**parts, "held": round(total, 1), "other": round(other, 1)})
    more = {
        "checkpoint": book.checkpoint - before.checkpoint,
        "finish": book.finish - before.finish,
    }
    more[cause] = more.get(cause, 0.0) + book.other - before.other
    lost = goodput.lost_seconds.model_dump(by_alias=False)
    seconds = {name: round(max(0.0, lost[name] + more.get(name, 0.0)), 1) for name in lost}
    training = round(goodput.training_seconds + book.training - before.training, 1)
    return book, Goodput(training_seconds=max(0.0, training), lost_seconds=LostSeconds(**seconds))


def _start(pod: Pod, now: float) -> float:
    return now if pod.scheduled is None else pod.scheduled


def _overlap(pod: Pod, start: float, now: float) -> float:
    """Seconds between `start` and `now` in which the pod held its node."""
    if pod.scheduled is None:
        return 0.0
    end = now if pod.ended is None else min(pod.ended, now)
    return max(0.0, end - max(pod.scheduled, start))


def _held(pods: Sequence[Pod], start: float, now: float) -> float:
    """Seconds between `start` and `now` in which any of the pods held a node."""
    spans = sorted(
        (max(pod.scheduled, start), now if pod.ended is None else min(pod.ended, now))
        for pod in pods
        if pod.scheduled is not None
    )
    held, reached = 0.0, start
    for begin, end in spans:
        held += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return held
