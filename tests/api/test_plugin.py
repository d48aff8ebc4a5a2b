"""`kubectl finetune`, run by the real kubectl on the real API server, with the statuses that the operator writes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.api.cluster import Cluster
from tests.api.objects import Api, eventually
from tests.api.plugin import KIND, NAME, SECONDS, MakeJob, Run, command, environment, make_job, run
from tests.api.terminal import Terminal
from tests.unit import plugin_cases as cases


@pytest.fixture
def plugin(api_cluster: Cluster, namespace: str) -> Run:
    return partial(run, api_cluster.kubeconfig, namespace)


@pytest.fixture
def make(api: Api, namespace: str) -> MakeJob:
    return partial(make_job, api, namespace)


def test_all_jobs_of_a_namespace_are_a_table(plugin: Run, make: MakeJob, namespace: str) -> None:
    empty = plugin("status")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert empty.stderr == f"No FinetuneJobs found in {namespace} namespace.\n"
    make("b", cases.queued()["status"])
    make("a", cases.training()["status"])
    rows = plugin("status").stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["NAME", "PHASE"], ["a", "Training"], ["b", "Queued"]]
    everywhere = plugin("status", "-A", where="").stdout
    assert re.search(rf"^{namespace} +a +Training", everywhere, re.MULTILINE)
    assert plugin("status", "-o", "wide").stdout.splitlines()[0].endswith("MESSAGE")
    assert [item["metadata"]["name"] for item in json.loads(plugin("status", "-o", "json").stdout)["items"]] == [
        "a",
        "b",
    ]


def test_one_job_is_shown_once_where_there_is_no_terminal(plugin: Run, make: MakeJob) -> None:
    make(status=cases.training()["status"])
    done = plugin("status", NAME)
    assert done.returncode == 0
    for words in ("step 1,200 of 4,000  30 %", "41.20 USD so far", "Preempted", "✓ Prepared"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert yaml.safe_load(plugin("status", NAME, "-o", "yaml").stdout)["status"]["attempt"] == 2


def test_waiting_for_a_job_prints_its_changes_and_ends_as_it_does(
    api: Api, api_cluster: Cluster, namespace: str, make: MakeJob
) -> None:
    make(status=cases.queued()["status"])
    line = command(api_cluster.kubeconfig, namespace, "status", NAME, "--watch")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment()) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline() == "Queued (Unschedulable)\n"
        api.patch(KIND, NAME, namespace, {"status": cases.training()["status"]}, status=True)
        assert waiting.stdout.readline().startswith("Training  step 1,200/4,000 30 %")
        api.patch(KIND, NAME, namespace, {"status": cases.complete(missed=True)["status"]}, status=True)
        assert waiting.stdout.readline().startswith("Failed (GateMissed)")
        assert waiting.wait(SECONDS) == 8


def test_in_a_terminal_the_view_is_live_until_the_job_has_ended(
    api: Api, api_cluster: Cluster, namespace: str, make: MakeJob
) -> None:
    make(status=cases.training()["status"])
    with Terminal(command(api_cluster.kubeconfig, namespace, "status", NAME), environment()) as terminal:
        eventually(lambda: "30 %" in terminal.text, "the view", SECONDS, lambda: terminal.text)
        api.patch(KIND, NAME, namespace, {"status": cases.complete()["status"]}, status=True)
        assert terminal.program.wait(SECONDS) == 0
    assert "The weights are in s3://models/support-chat" in terminal.text


def test_ctrl_c_leaves_the_live_view_without_words(api_cluster: Cluster, namespace: str, make: MakeJob) -> None:
    make(status=cases.training()["status"])
    with Terminal(command(api_cluster.kubeconfig, namespace, "status", NAME), environment()) as terminal:
        eventually(lambda: "30 %" in terminal.text, "the view", SECONDS, lambda: terminal.text)
        terminal.program.send_signal(signal.SIGINT)
        assert terminal.program.wait(SECONDS) == 130
    assert "Traceback" not in terminal.text
    assert "interrupted" not in terminal.text


def test_a_job_that_is_deleted_while_somebody_looks_at_it_ends_the_view(
    api: Api, api_cluster: Cluster, namespace: str, make: MakeJob
) -> None:
    make(status=cases.training()["status"])
    line = command(api_cluster.kubeconfig, namespace, "status", NAME, "-w")
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as waiting:
        assert waiting.stdout
        waiting.stdout.readline()
        api.delete(KIND, NAME, namespace)
        _, said = waiting.communicate(timeout=SECONDS)
    assert waiting.returncode == 1
    assert said == f"{NAME} was deleted meanwhile\n"


def test_suspend_and_resume_change_the_spec_and_say_what_follows(
    plugin: Run, api: Api, make: MakeJob, namespace: str
) -> None:
    make(status=cases.training()["status"])
    assert plugin("resume", NAME).stdout == f"{NAME} is not suspended (Training)\n"
    assert "writes a checkpoint" in plugin("suspend", NAME).stdout
    assert api.get(KIND, NAME, namespace)["spec"]["suspend"] is True
    assert plugin("suspend", NAME).stdout == f"{NAME} is suspended already (Training)\n"
    assert plugin("resume", NAME).stdout == f"{NAME} goes on from step 1,150\n"
    assert api.get(KIND, NAME, namespace)["spec"]["suspend"] is False


def test_an_ended_job_can_be_neither_suspended_nor_resumed(plugin: Run, make: MakeJob) -> None:
    make(status=cases.complete()["status"])
    for word in ("suspend", "resume"):
        done = plugin(word, NAME)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{NAME} has ended (Complete) and stays so\n")


def test_cancel_asks_and_says_what_stays(plugin: Run, api: Api, make: MakeJob, namespace: str) -> None:
    make(status=cases.training()["status"])
    asked = plugin("cancel", NAME)
    assert asked.returncode == 2
    assert "say --yes" in asked.stderr
    assert api.find(KIND, NAME, namespace)
    done = plugin("cancel", NAME, "--yes")
    assert done.returncode == 0
    assert "kept: checkpoint s3://models/support-chat/.finetune/" in done.stdout
    assert api.find(KIND, NAME, namespace) is None


def test_the_report_has_losses_gates_and_addresses(plugin: Run, make: MakeJob) -> None:
    make(status=cases.complete()["status"])
    shown = plugin("report", NAME).stdout
    for words in ("2.3104 → 1.8271  (-20.9%)", "✓ evalLossRatio 0.7908", "s3://models/support-chat/report.html"):
        assert words in shown
    assert json.loads(plugin("report", NAME, "-o", "json").stdout)["result"] == cases.complete()["status"]["result"]


def test_there_is_no_report_before_the_end(plugin: Run, make: MakeJob) -> None:
    make(status=cases.training()["status"])
    done = plugin("report", NAME)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{NAME} is Training and has no result yet\n  → ")


def test_the_plan_is_that_of_prepare(plugin: Run, make: MakeJob) -> None:
    make("new")
    assert "new has no plan yet; prepare makes it." in plugin("plan", "new").stderr
    make(status=cases.training()["status"])
    assert "131,072,000 an epoch" in plugin("plan", NAME).stdout
    assert json.loads(plugin("plan", NAME, "-o", "json").stdout) == cases.PLAN


def test_a_file_is_planned_by_another_command(plugin: Run) -> None:
    done = plugin("plan", "job.yaml")
    assert done.returncode == 1
    assert "`finetune plan job.yaml` plans a file" in done.stderr


# What goes wrong.


def test_a_missing_job_names_those_that_may_be_meant(
    plugin: Run, make: MakeJob, api_cluster: Cluster, namespace: str
) -> None:
    make()
    done = plugin("status", "suport-chat")
    assert done.returncode == 1
    assert done.stderr == f"there is no FinetuneJob suport-chat in namespace {namespace}\n  → did you mean {NAME}?\n"
    assert f"\n  → there are {NAME}\n" in plugin("report", "x").stderr
    assert re.search(r"there is one in namespace .+: add -n ", plugin("status", NAME, where="default").stderr)


def test_a_missing_right_is_named_with_who_lacks_it(
    plugin: Run, make: MakeJob, local_cluster: Cluster, namespace: str
) -> None:
    make()
    stranger = local_cluster.user("stranger")
    done = plugin("status", NAME, user=stranger)
    assert done.returncode == 1
    assert done.stderr.startswith(f"stranger may not get finetunejobs in namespace {namespace}\n  → ask the cluster's ")
    assert f"kubectl auth can-i get finetunejobs.finetune.dev -n {namespace}" in done.stderr
    assert "may not list finetunejobs in all namespaces" in plugin("status", "-A", user=stranger, where="").stderr


def test_a_user_who_may_only_read_jobs_is_told_that_pods_are_out_of_reach(
    plugin: Run, make: MakeJob, api: Api, local_cluster: Cluster, namespace: str
) -> None:
    make(status=cases.training()["status"])
    rules = [{"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["get", "list"]}]
    group = "rbac.authorization.k8s.io"
    api.create(
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": rules}, namespace=namespace
    )
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "r"},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": "r"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "tenant"}],
    }
    api.create(binding, namespace=namespace)
    tenant = local_cluster.user("tenant")
    eventually(lambda: plugin("status", NAME, user=tenant).returncode == 0, "the right")
    assert "did you mean" in plugin("status", "suport-chat", user=tenant).stderr
    assert f"tenant may not list pods in namespace {namespace}" in plugin("logs", NAME, user=tenant).stderr
    assert "tenant may not patch finetunejobs" in plugin("suspend", NAME, user=tenant).stderr


def test_an_unknown_token_is_a_matter_of_signing_in(plugin: Run, local_cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(local_cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": "expired"}
    file = tmp_path / "expired.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    assert plugin("status", user=file).stderr.startswith("the API server does not accept your sign-in\n")


def test_no_cluster_and_no_server_are_told_apart(plugin: Run, api_cluster: Cluster, tmp_path: Path) -> None:
    missing = plugin("status", user=tmp_path / "none")
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"there is no cluster to talk to: no file {tmp_path / 'none'}\n")
    config = yaml.safe_load(api_cluster.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    file = tmp_path / "away.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    away = plugin("status", user=file)
    assert away.returncode == 1
    assert away.stderr.startswith("the API server at https://127.0.0.1:1 does not answer: ")
    assert "refused" in away.stderr
    wrong = plugin("status", "--context", "nope")
    assert wrong.returncode == 1
    assert "nope" in wrong.stderr
    file.write_text("- not a kubeconfig")
    assert "cannot be used" in plugin("status", user=file).stderr


def test_the_namespace_is_that_of_the_context_when_none_is_named(
    plugin: Run, make: MakeJob, api_cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    make()
    config = yaml.safe_load(api_cluster.kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = namespace
    file = tmp_path / "mine.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    assert NAME in plugin("status", user=file, where="").stdout
