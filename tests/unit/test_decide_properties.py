"""Whatever is observed, in whatever order, with crashes and stale caches: what must never happen does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api.status import FinetuneJobStatus
from finetune_operator.actions import (
    Decision,
    Delete,
    DeleteSelf,
    ForceDelete,
    MakeAttempt,
    MakePrepare,
    MakePrepareCluster,
    MakeResult,
)
from finetune_operator.decide import decide
from finetune_operator.observe import BatchJob, Block, Observed, Pod, RayCluster, RayJob, Stop
from tests.unit.operator_world import (
    NOW,
    RESULT,
    TIMING,
    batch_job,
    job_spec,
    observed,
    pod,
    prepared,
    ray_cluster,
    ray_job,
    report,
)

RETRIES, PREEMPTIONS = 2, 1
MAKING = MakePrepare | MakePrepareCluster | MakeAttempt | MakeResult


class World(RuleBasedStateMachine):
    """A job in a cluster where anything happens. `seen` is what the operator's caches show, which may be old."""

    @initialize(
        deadline=st.sampled_from([None, None, "2h"]),
        cap=st.sampled_from([None, None, 300]),
        trains=st.booleans(),
        workers=st.sampled_from([None, 3]),
    )
    def begin(self, deadline: str | None, cap: int | None, trains: bool, workers: int | None) -> None:
        limits: dict[str, object] = {"retries": RETRIES, "preemptions": PREEMPTIONS}
        limits |= ({"activeDeadline": deadline} if deadline else {}) | ({"maxCost": cap} if cap else {})
        rows = {"train": [{"uri": "s3://rows/chat.jsonl"}]}
        self.spec = job_spec(limits=limits, data=rows | ({"prepare": {"workers": workers}} if workers else {}))
        self.status = FinetuneJobStatus()
        self.now = NOW
        self.prepare: BatchJob | None = None
        self.cluster: RayCluster | None = None
        self.result: BatchJob | None = None
        self.attempts: dict[int, RayJob] = {}
        self.pods: list[Pod] = []
        self.made: list[int] = []
        self.serial = 0
        self.ended: float | None = None
        self.deleted = False
        if trains:  # much of what can happen needs a running attempt
            self.status = prepared()
            self.prepare = batch_job(complete=True)
            self.made = [1]
            self.attempts = {1: ray_job()}
            self.pods = [pod(role="head"), pod()]
        self.seen = self.look()

    def look(self) -> Observed:
        running = next((each for each in self.attempts.values() if each.deployment == "Running"), None)
        heads = [each for each in self.pods if each.role == "head" and each.live]
        return observed(
            spec=self.spec,
            status=self.status,
            prepare=self.prepare,
            prepare_cluster=self.cluster,
            result=self.result,
            attempts=dict(self.attempts),
            pods=list(self.pods),
            report=report(running.attempt, step=self.serial) if running and heads else None,
            report_time=self.now,
            head_lost=self.now - 60 if running and not heads else None,
            ended=self.ended,
        )

    @rule(seconds=st.sampled_from([1, 10, 60, 60, 600]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def caches_catch_up(self) -> None:
        self.seen = self.look()

    @precondition(lambda self: not self.deleted)
    @rule(stale=st.sampled_from([False, False, True]), crash=st.sampled_from([None, None, None, 0, 1, 2]))
    def operator_acts(self, stale: bool, crash: int | None) -> None:
        """One reconcile. `crash` is after how many of its writes the process dies."""
        view = self.seen if stale else self.look()
        # One object with one resourceVersion: when it has changed, the status patch (or the check) fails.
        fresh = view.job.status == self.status and view.job.spec == self.spec
        decision = decide(view, self.now, TIMING)
        if not fresh or crash == 0:
            return
        self.check(self.status, decision)
        self.status = decision.status
        for action in decision.actions[: None if crash is None else crash - 1]:
            self.carry_out(action)
        if not stale and crash is None and not self.deleted:
            self.everything_not_live_is_released()

    def check(self, before: FinetuneJobStatus, decision: Decision) -> None:
        after = decision.status
        assert (after.attempt or 0) >= (before.attempt or 0), "the attempt number never falls"
        if before.phase in ("Complete", "Failed"):
            assert after.phase == before.phase, "terminal stays terminal"
            assert after.completion_time == before.completion_time
            assert not any(isinstance(each, MAKING) for each in decision.actions)
        if after.attempts:
            assert 0 <= after.attempts.retries <= RETRIES
            assert 0 <= after.attempts.preemptions <= PREEMPTIONS
            assert after.attempts.ended <= (after.attempt or 0)
        for action in decision.actions:
            if isinstance(action, MakePrepare | MakePrepareCluster):
                assert not self.spec.suspend
                assert action.workers == self.spec.data.prepare.workers
            if isinstance(action, MakeAttempt):
                assert action.number == after.attempt, "an attempt starts after its number is written"
                assert after.attempts is not None
                assert after.attempts.ended < action.number
                assert not self.spec.suspend
        limits = ("DeadlineExceeded", "CostExceeded")  # of the job, not of an attempt
        failed = [each.attempt for each in after.failures if each.attempt and each.reason not in limits]
        assert len(failed) == len(set(failed)), "an attempt fails once"
        if before.cost and after.cost:
            assert after.cost.spent >= before.cost.spent
        if after.goodput:
            assert after.goodput.training_seconds >= 0
            assert min(after.goodput.lost_seconds.model_dump().values()) >= 0

    def carry_out(self, action: object) -> None:
        match action:
            case MakeResult() if self.result is None:
                self.result = batch_job(name="support-result", uid="result", created=self.now)
            case MakeAttempt(number) if number not in self.attempts:  # else: AlreadyExists
                assert number not in self.made, "no second attempt with the same number"
                self.made.append(number)
                self.attempts[number] = ray_job(number, deployment="", outcome="", created=self.now)
            case Delete("RayJob", _, uid):
                for number, each in self.attempts.items():
                    if each.uid == uid and each.deleting is None:
                        self.attempts[number] = replace(each, deleting=self.now)
            case Delete("Job", _, uid) if self.result and self.result.uid == uid:
                self.result = None
            case ForceDelete(_, uid, _, names):
                self.pods = [each for each in self.pods if each.name not in names]
                self.attempts = {number: each for number, each in self.attempts.items() if each.uid != uid}
            case DeleteSelf():
                self.deleted = True
            case _:
                self.carry_out_prepare(action)

    def carry_out_prepare(self, action: object) -> None:
        match action:
            case MakePrepare() if self.prepare is None:
                self.serial += 1
                self.prepare = batch_job(uid=f"prepare-{self.serial}", created=self.now)
            case MakePrepareCluster() if self.cluster is None:
                self.serial += 1
                self.cluster = ray_cluster(uid=f"cluster-{self.serial}", begun=self.now, ready=False)
            case Delete("RayCluster", _, uid):
                if self.cluster and self.cluster.uid == uid:
                    self.cluster = None
            case Delete("Job", _, uid):
                if self.prepare and self.prepare.uid == uid:
                    self.prepare = None

    def everything_not_live_is_released(self) -> None:
        """After an undisturbed reconcile nothing holds GPUs but the live attempt, or it is on its way out."""
        ended = self.status.attempts.ended if self.status.attempts else 0
        live = self.status.attempt if (self.status.attempt or 0) > ended else None
        if self.status.phase in ("Complete", "Failed", "Suspended"):
            assert live is None
        for each in self.attempts.values():
            assert each.attempt == live or each.deleting is not None
            assert self.cluster is None
        if any(each.type == "Prepared" and each.status == "True" for each in self.status.conditions):
            assert self.cluster is None
        if self.status.phase == "Suspended":
            assert not self.attempts
            assert not any(each.live for each in self.pods)

    @invariant()
    def at_most_one_attempt_lives(self) -> None:
        if hasattr(self, "attempts"):
            ended = self.status.attempts.ended if self.status.attempts else 0
            assert sum(each.deleting is None and each.attempt > ended for each in self.attempts.values()) <= 1

    @precondition(lambda self: self.prepare is not None and self.prepare.running)
    @rule(outcome=st.sampled_from(["complete", "Storage", "UserData"]))
    def prepare_ends(self, outcome: str) -> None:
        assert self.prepare is not None
        if outcome == "complete":
            self.prepare = replace(self.prepare, complete=True)
        else:
            self.prepare = replace(self.prepare, failed=Block("BackoffLimitExceeded", outcome))

    @precondition(lambda self: self.cluster is not None)
    @rule(change=st.sampled_from([{"ready": True}, {"ready": True}, {"suspended": True}, {"suspended": False}, None]))
    def the_cluster_changes(self, change: dict[str, Any] | None) -> None:
        assert self.cluster is not None
        self.cluster = replace(self.cluster, **change) if change else None

    @precondition(lambda self: self.result is not None and self.result.running)
    @rule(good=st.booleans())
    def result_ends(self, good: bool) -> None:
        assert self.result is not None
        words = f'{{"result": {RESULT.model_dump_json(by_alias=True)}}}' if good else ""
        self.result = replace(self.result, complete=True)
        stops = (Stop("result", 0, "Completed", words),)
        self.pods.append(pod(None, "other", stage="result", gpus=0, phase="Succeeded", ended=self.now, stops=stops))

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(), state=st.sampled_from(["Initializing", "Running", "Running", "Suspended", "Complete", "Failed"])
    )
    def kuberay_moves(self, data: st.DataObject, state: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.attempts)))
        outcome = {"Running": "RUNNING", "Complete": "SUCCEEDED", "Failed": "FAILED"}.get(state, "")
        self.attempts[number] = replace(
            self.attempts[number],
            deployment=state,
            outcome=outcome,
            suspended=state == "Suspended",
        )
        self.ended = self.now if state in ("Complete", "Failed") else None
        if state == "Running" and self.attempts[number].deleting is None:
            self.serial += 1
            roles = ("head", "worker")
            self.pods += [
                pod(number, role, self.serial, scheduled=self.now, created=self.now, node="n") for role in roles
            ]

    @precondition(lambda self: self.pods)
    @rule(data=st.data(), how=st.sampled_from(["gone", "ended", "preempted", "oom"]))
    def a_pod_ends(self, data: st.DataObject, how: str) -> None:
        index = data.draw(st.integers(0, len(self.pods) - 1))
        if how == "gone":
            del self.pods[index]
            return
        stops = (Stop("ray-worker", 137, "OOMKilled", ""),) if how == "oom" else ()
        disrupted = Block("PreemptionByScheduler", "a higher priority") if how == "preempted" else None
        self.pods[index] = replace(self.pods[index], phase="Failed", ended=self.now, stops=stops, disrupted=disrupted)

    @precondition(lambda self: any(each.deleting is not None for each in self.attempts.values()))
    @rule()
    def kuberay_finishes_deleting(self) -> None:
        gone = [number for number, each in self.attempts.items() if each.deleting is not None]
        self.pods = [each for each in self.pods if each.attempt not in gone]
        self.attempts = {number: each for number, each in self.attempts.items() if number not in gone}

    @precondition(lambda self: self.status.attempts is not None and self.status.attempts.uid is not None)
    @rule()
    def somebody_deletes_the_ray_job(self) -> None:
        self.attempts = {
            number: replace(each, deleting=each.deleting or self.now) for number, each in self.attempts.items()
        }

    @rule(suspend=st.sampled_from([False, False, True]))
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.spec = self.spec.model_copy(update={"suspend": suspend})


World.TestCase.settings = settings(max_examples=1000, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
