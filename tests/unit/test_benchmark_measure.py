import json
import math
from pathlib import Path

from benchmarks.scale.measure import Audit, delays, percentile

from tests.api.cluster import Cluster


def test_a_percentile_is_a_value_that_was_measured() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert [percentile(hundred, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_what_never_came_has_no_delay() -> None:
    assert delays({"a": 1.0, "b": 2.0}, {"a": 4.5}) == [3.5]


def audited(name: str, second: int, code: int = 200, **fields: str) -> dict[str, object]:
    time = f"2026-11-23T16:44:{second:02}.500000Z"
    return {
        "stage": "ResponseComplete",
        "verb": "patch",
        "user": {"username": "admin"},
        "userAgent": "finetune-operator",
        "objectRef": {"resource": "finetunejobs", "subresource": "status", "namespace": "n", "name": name},
        "responseStatus": {"code": code},
        "requestReceivedTimestamp": time,
        "stageTimestamp": time,
        **fields,
    }


def test_the_first_answer_that_was_no_refusal_counts(tmp_path: Path) -> None:
    entries = [audited("a", 1, 409), audited("a", 2), audited("a", 3), audited("b", 4, verb="watch")]
    (tmp_path / "audit.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    audit = Audit(Cluster(tmp_path, tmp_path / "kubeconfig"))
    written = audit.of("finetune-operator", "update|patch", "finetunejobs/status")
    assert list(written) == ["a"]
    assert audit.requests("finetune-operator", written["a"]) == {("patch", "finetunejobs/status"): 2}
    assert not audit.requests("kuberay", 0)
