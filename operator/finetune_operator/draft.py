"""A decision in the making: the status as it will be, the actions so far, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from finetune_api.stage import ProgressReport
from finetune_api.status import DESTINATIONS, Attempts, Condition, Phase, Result
from finetune_operator.accounting import Cause, account
from finetune_operator.actions import Action, Decision, Event
from finetune_operator.observe import Observed, Refused, format_time, parse_time
from finetune_operator.wording import sentence

# Reasons for not running that are nothing to warn of: an event of its own has told of what is retried.
_CALM: Final = ("Starting", "Retrying", "Restarting", "Queued", "Suspending", "Suspended")
TERMINAL: Final = ("Complete", "Failed")
_COUNTED: Final = ("cost", "goodput", "accounted")


@dataclass(frozen=True)
class Timing:
    """Intervals and bounds in seconds.

    Attributes:
        progress: between two looks at a running attempt.
        start: that a stage's pods may take until they run.
        hang: without a step, a checkpoint or anything else, until an attempt counts as hanging.
        grace: that a pod may take to end, and so the time in which a checkpoint is written.
        account: between two writes that change cost and goodput only.
    """

    progress: float = 10.0
    start: float = 1800.0
    hang: float = 3600.0
    grace: float = 120.0
    account: float = 30.0


class Draft:
    """Collects a decision. `status` is replaced, never changed in place."""

    def __init__(self, observed: Observed, now: float, timing: Timing) -> None:
        self.observed, self.now, self.timing = observed, now, timing
        self.old = observed.job.status
        self.status = self.old.model_copy(
            update={
                "observed_generation": observed.job.generation,
                "start_time": self.old.start_time or format_time(now),
                "runtime": observed.runtime_name or self.old.runtime,
            }
        )
        self.actions: list[Action] = []
        self._wake: float | None = None

    @property
    def book(self) -> Attempts:
        return self.status.attempts or Attempts()

    @property
    def attempt(self) -> int:
        return self.status.attempt or 0

    @property
    def live(self) -> int | None:
        """The attempt that may run."""
        return self.attempt if not self.terminal and self.book.ended < self.attempt else None

    @property
    def terminal(self) -> bool:
        return any(self.holds(name) for name in TERMINAL)

    @property
    def report(self) -> ProgressReport | None:
        """The newest report of the current attempt."""
        report = self.observed.report
        return report if report and report.attempt == self.attempt else None

    def holds(self, condition: str) -> bool:
        return any(each.type == condition and each.status == "True" for each in self.status.conditions)

    def set(self, **fields: Any) -> None:
        self.status = self.status.model_copy(update=fields)

    def note(self, **fields: Any) -> None:
        """Writes into the book of the attempts."""
        self.set(attempts=self.book.model_copy(update=fields))

    def say(self, phase: Phase, reason: str, message: str = "", *, running: bool = False) -> None:
        """Where the job is and why, for people and as condition Running."""
        message = sentence(message)
        self.set(phase=phase, reason=reason, message=message or None)
        self.condition("Running", "True" if running else "False", reason, message)

    def condition(self, kind: str, status: Literal["True", "False"], reason: str, message: str = "") -> None:
        """Sets a condition; its time is that of the last change of `status`."""
        before = next((each for each in self.status.conditions if each.type == kind), None)
        changed = before.last_transition_time if before and before.status == status else format_time(self.now)
        after = Condition(
            type=kind,
            status=status,
            observed_generation=self.observed.job.generation,
            last_transition_time=changed,
            reason=reason,
            message=message,
        )
        kept = [after if each.type == kind else each for each in self.status.conditions]
        self.set(conditions=kept if before else [*kept, after])

    def end(self, condition: Literal["Complete", "Failed"], reason: str, message: str) -> None:
        """The end of the job, for ever. Its current attempt has ended, too."""
        if self.attempt:
            self.note(ended=self.attempt)
        self.say(condition, reason, message)
        self.condition(condition, "True", reason, sentence(message))
        self.set(completion_time=format_time(self.now))

    def act(self, action: Action) -> None:
        self.actions.append(action)

    def try_again(self, refused: Refused, action: Action) -> None:
        """Does what the cluster refused, when its pause is over."""
        if self.now < refused.until:
            self.wake(refused.until - self.now)
        else:
            self.act(action)

    def wake(self, seconds: float) -> None:
        """Look again after so many seconds at the latest."""
        seconds = max(seconds, 0.1)
        self._wake = seconds if self._wake is None else min(self._wake, seconds)

    def decision(self) -> Decision:
        self._account()
        status = self.old if self._only_counted() else self.status
        return Decision(status, tuple(self.actions), tuple(self._events()), self._wake)

    def _account(self) -> None:
        pods = self.observed.pods_of("train")
        runtime = self.observed.runtime
        accelerator = runtime.accelerator if runtime else None
        counted = account(self.status, pods, accelerator, self.report, self._cause(), self.now)
        self.set(cost=counted.cost, goodput=counted.goodput, accounted=counted.accounted)
        if any(pod.live for pod in pods):
            self.wake(self.timing.account)

    def _cause(self) -> Cause:
        """What time that no report explains is lost to."""
        if self.live:
            return "startup"
        if self.holds("Complete"):
            return "finish"
        last = self.status.failures[-1] if self.status.failures else None
        if last is None or last.attempt != self.attempt:
            return "checkpoint"  # suspended
        return "preemption" if last.reason == "Preempted" else "failure"

    def _only_counted(self) -> bool:
        """Whether nothing but cost and goodput would change, and that too soon."""
        same = self.status.model_copy(update={name: getattr(self.old, name) for name in _COUNTED})
        if same != self.old:
            return False
        before = parse_time(self.old.accounted.time) if self.old.accounted else None
        return before is not None and self.now - before < self.timing.account

    def _events(self) -> list[Event]:
        old, new = self.old, self.status
        events = [
            Event("Warning", failure.reason, failure.message) for failure in new.failures if failure not in old.failures
        ]
        if new.message and (new.phase, new.reason) != (old.phase, old.reason):
            calm = self.holds("Running") or self.holds("Complete") or new.reason in _CALM
            word = new.phase if new.phase != old.phase and (calm or new.phase == "Failed") else new.reason
            events.append(Event("Normal" if calm else "Warning", word or "Pending", new.message))
        if new.result and not old.result and (warning := self._open(new.result)):
            events.append(warning)
        return events

    def _open(self, result: Result) -> Event | None:
        """A warning when workers reached what their NetworkPolicy should keep them from."""
        runtime, reached = self.observed.runtime, [DESTINATIONS[each.to] for each in result.egress if each.reached]
        if not reached or runtime is None or not runtime.network_policy.enabled:
            return None
        message = (
            f"Its workers reached {', '.join(reached)}. If the runtime's networkPolicy.egress does not allow that, the "
            "cluster's network plugin does not enforce NetworkPolicies."
        )
        return Event("Warning", "EgressOpen", message)
