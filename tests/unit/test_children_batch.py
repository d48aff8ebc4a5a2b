from __future__ import annotations

from finetune_operator.children.prepare import prepare_job
from finetune_operator.children.result import result_job
from tests.unit.children_cases import JOBS, OWNER, RUNTIMES, job, runtime


def test_a_bad_row_ends_the_job_and_a_bucket_that_is_away_does_not() -> None:
    rules = prepare_job(OWNER, job(), runtime(), None)["spec"]["podFailurePolicy"]["rules"]
    (final,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert final == [2, 3, 4, 8, 9]  # docs/reference/exit-codes.md: 5 is storage, 6 the run itself


def test_a_pod_that_is_taken_away_costs_no_retry() -> None:
    first = prepare_job(OWNER, job(), runtime(), None)["spec"]["podFailurePolicy"]["rules"][0]
    assert first["action"] == "Ignore"
    assert first["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_data_is_prepared_without_accelerators_and_off_their_nodes() -> None:
    pod = prepare_job(OWNER, JOBS["on GPUs"], RUNTIMES["everything"], None)["spec"]["template"]["spec"]
    assert set(pod["containers"][0]["resources"]["limits"]) == {"memory"}
    assert "nodeSelector" not in pod
    assert "tolerations" not in pod
    assert pod["containers"][0]["command"] == ["finetune", "prepare", "--run", "/etc/finetune/run.json"]


def test_the_result_is_read_with_the_configuration_of_the_attempt_that_made_it() -> None:
    manifest = result_job(OWNER, job(), runtime(), 7)
    pod = manifest["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["finetune", "result", "--run", "/etc/finetune/run.json"]
    assert pod["volumes"][0]["configMap"]["name"] == "support-chat-a7"
    assert manifest["metadata"]["labels"]["finetune.dev/attempt"] == "7"
