"""The command line of `kubectl finetune`: its help, its flags, and what it says of refusals and of logs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api import cli
from finetune_operator.plugin.cluster import refusal
from finetune_operator.plugin.command import plugin
from finetune_operator.plugin.help import Command
from finetune_operator.plugin.logs import Wanted, lost_attempts, nothing, sources
from finetune_operator.plugin.reading import read
from tests.unit import plugin_cases as cases

COMMANDS = {name: each for name, each in plugin.commands.items() if isinstance(each, Command)}
NAME = "kubectl finetune"


def run(*arguments: str) -> int:
    return cli.run(arguments, plugin, NAME)


def test_every_command_is_there_and_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(plugin.commands) == ["status", "logs", "report", "suspend", "resume", "cancel", "plan"]
    assert COMMANDS.keys() == plugin.commands.keys()
    assert run() == 0
    shown = capsys.readouterr().out
    assert f"Usage:\n  {NAME} COMMAND [options]\n" in shown
    for name, command in plugin.commands.items():
        assert f"  {name} " in shown
        assert command.get_short_help_str(100) in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_the_sections_of_kubectls(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    positions = [shown.index(f"\n{section}:\n") for section in ("Examples", "Options", "Usage")]
    assert positions == sorted(positions)
    assert f"\n  {NAME} {name} " in shown
    assert "    -n, --namespace='':\n        " in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_command_lines_that_are_understood(name: str) -> None:
    for _, line in COMMANDS[name].examples:
        words = shlex.split(line.partition(" | ")[0])
        assert words[:3] == ["kubectl", "finetune", name]
        COMMANDS[name].make_context(name, words[3:])


@pytest.mark.parametrize(
    "line",
    [
        "status --watch",
        "status job -A",
        "status job -w --once",
        "status job -w -o json",
        "logs",
        "logs job --head --rank 1",
        "logs job -f -p",
        "logs job --attempt 0",
        "report job -o wide",
        "stop job",
        "status --nope",
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2_and_a_sentence(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Usage: {NAME}")
    assert "\nError: " in said


def test_flags_may_stand_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--kubeconfig", str(tmp_path / "none"), "status") == 1
    assert f"no file {tmp_path / 'none'}" in capsys.readouterr().err


def test_help_and_refusals_of_the_command_line_load_no_client() -> None:
    code = (
        "import sys; from finetune_operator.plugin.command import plugin; from finetune_api.cli import run;"
        "run(['logs', '--help'], plugin); run(['status', '-w'], plugin);"
        "print('loaded:', {'kubernetes', 'aiohttp', 'rich', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: set()\n")


def test_a_forbidden_subresource_is_asked_for_as_kubectl_wants_it() -> None:
    said = 'pods "p" is forbidden: User "jane" cannot get resource "pods/log" in API group "" in the namespace "team-a"'
    error = refusal(403, json.dumps({"message": said, "details": {"name": "p"}}).encode(), "/api/v1/…")
    assert error.what == "jane may not get pods/log in namespace team-a"
    assert "`kubectl auth can-i get pods --subresource=log -n team-a`" in error.hint


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (404, b"404 page not found\n", "this cluster has no FinetuneJobs: finetune is not installed"),
        (403, b'{"message": "exceeded quota"}', "the API server forbids it: exceeded quota"),
        (503, b"<html>no upstream</html>", "the API server cannot do it now: <html>no upstream</html>"),
        (422, b'{"message": "spec.model: Invalid value"}', "spec.model: Invalid value"),
        (500, b"", "the API server cannot do it now: it does not say why"),
        (409, b"[]", "[]"),
    ],
)
def test_a_refusal_is_a_sentence(status: int, body: bytes, what: str) -> None:
    assert refusal(status, body, "/apis/finetune.dev/v1alpha1/finetunejobs").what == what


# Which logs.


def pod(name: str, stage: str, attempt: int | None = None, role: str = "", **state: Any) -> dict[str, Any]:
    """A pod as the API server has it; `state` is its container's."""
    labels = {"finetune.dev/job": "support-chat", "finetune.dev/stage": stage}
    labels |= {"finetune.dev/attempt": str(attempt)} if attempt else {}
    labels |= {"ray.io/node-type": role} if role else {}
    return {
        "metadata": {"name": name, "uid": name, "labels": labels},
        "spec": {"containers": [{"name": "main"}]},
        "status": {"containerStatuses": [{"name": "main", "restartCount": 0, "state": state or {"running": {}}}]},
    }


PODS = [
    pod("r", "result", 2),
    pod("w2", "train", 2, "worker"),
    pod("w1", "train", 2, "worker"),
    pod("x-head", "train", 2, "head"),
    pod("w0", "train", 1, "worker"),
    pod("p", "prepare"),
    pod("p-worker", "prepare", role="worker"),
    pod("n", "something-new"),
]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Wanted(), "p w0 x-head w1 w2 r"),
        (Wanted(stage="prepare"), "p"),
        (Wanted(attempt=2), "x-head w1 w2"),
        (Wanted(head=True), "x-head"),
        (Wanted(rank=0), "w0 w1 w2"),
        (Wanted(rank=0, attempt=1), "w0"),
        (Wanted(stage="result", head=True), ""),
    ],
)
def test_logs_are_those_that_were_asked_for_in_the_order_of_what_happened(wanted: Wanted, names: str) -> None:
    assert [source.pod for source in sources(PODS, wanted)] == names.split()


def test_a_container_that_waits_has_no_log_and_one_that_was_restarted_has() -> None:
    waiting = pod("w", "train", 1, "worker", waiting={"reason": "CrashLoopBackOff"})
    (source,) = sources([waiting], Wanted())
    assert (source.waiting, source.running) == ("CrashLoopBackOff", False)
    waiting["status"]["containerStatuses"][0]["restartCount"] = 2
    (source,) = sources([waiting], Wanted())
    assert (source.waiting, source.restarts) == ("", 2)
    del waiting["status"]["containerStatuses"]
    (source,) = sources([waiting | {"status": {"phase": "Pending"}}], Wanted())
    assert source.waiting == "Pending"


def test_a_rank_of_one_figure_is_not_found_in_those_of_two() -> None:
    assert Wanted(rank=1).keeps(b"[rank 1] step 7")
    assert not Wanted(rank=1).keeps(b"[rank 10] step 7")
    assert not Wanted(rank=1).keeps(b"started [rank 1] ")


def test_where_no_pod_is_left_the_status_says_what_is_known() -> None:
    job = read(cases.failed())
    what, hint = nothing(job, Wanted(attempt=1))
    assert what == "support-chat has no pods of attempt 1; logs go with their pods"
    assert hint.startswith("attempt 1 failed: Preempted: Worker pod")
    assert nothing(job, Wanted())[1].startswith("attempt 2 failed: OutOfGpuMemory")
    assert nothing(read(cases.queued()), Wanted(stage="train"))[1].startswith("it is Queued: Pod support-chat-a1")
    assert nothing(read(cases.job()), Wanted(attempt=1))[0] == ("support-chat has no attempt 1: it has none yet")


def test_attempts_without_pods_are_told() -> None:
    assert lost_attempts(read(cases.failed()), sources(PODS, Wanted(stage="result"))) == [1, 2]
    assert lost_attempts(read(cases.failed()), sources(PODS[:4], Wanted())) == [1]
