"""The store of what the watches have seen."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.controller import trim_kube_job, trim_pod, trim_ray_job
from finetune_operator.store import JOB_LABEL, Key, Store, trim_metadata

Object = dict[str, Any]


def pod(name: str = "p", version: int = 1, job: str | None = "j", namespace: str = "ns", **status: object) -> Object:
    metadata = {"name": name, "namespace": namespace, "resourceVersion": str(version), "managedFields": [{"a": 1}]}
    return {"metadata": metadata | ({"labels": {JOB_LABEL: job}} if job else {}), "spec": {}, "status": status}


def test_an_object_comes_back_as_it_was_but_for_what_was_trimmed() -> None:
    store: Store[None] = Store(trim_metadata)
    assert store.put(pod(phase="läuft", version=7))
    assert store.get(("ns", "p")) == {
        "metadata": {"name": "p", "namespace": "ns", "resourceVersion": "7", "labels": {JOB_LABEL: "j"}},
        "spec": {},
        "status": {"phase": "läuft"},
    }
    assert store.get(("ns", "other")) is None


def test_a_version_that_says_nothing_new_is_no_change() -> None:
    store: Store[None] = Store(trim_metadata)
    store.put(pod(version=1, phase="Running"))
    newer = pod(version=2, phase="Running")
    newer["metadata"]["managedFields"] = [{"b": 2}]
    assert not store.put(newer)
    found = store.get(("ns", "p"))
    assert found
    assert found["metadata"]["resourceVersion"] == "2", "the next write needs it"


def test_an_older_version_is_ignored() -> None:
    store: Store[None] = Store(trim_metadata)
    store.put(pod(version=10, phase="Running"))
    assert not store.put(pod(version=9, phase="Pending"))
    assert not store.remove(("ns", "p"), 9), "that was another one of the same name"
    found = store.get(("ns", "p"))
    assert found
    assert found["status"] == {"phase": "Running"}


def test_what_was_deleted_does_not_come_back_by_a_late_answer() -> None:
    store: Store[None] = Store(trim_metadata)
    store.put(pod(version=10))
    assert store.remove(("ns", "p"), 12)
    assert not store.put(pod(version=11))
    assert store.put(pod(version=13)), "a new one of the same name"


def test_children_are_found_by_their_job_also_when_they_were_just_deleted() -> None:
    store: Store[None] = Store(trim_metadata)
    store.put(pod("b", job="j"))
    store.put(pod("a", job="j"))
    store.put(pod("c", job="k"))
    store.put(pod("d", job="j", namespace="elsewhere"))
    store.put(pod("e", job=None))
    assert [each["metadata"]["name"] for each in store.of_job(("ns", "j"))] == ["a", "b"]
    store.remove(("ns", "a"), 5)
    assert [each["metadata"]["name"] for each in store.of_job(("ns", "j"))] == ["b"]
    assert store.job_of(("ns", "a")) == ("ns", "j")
    store.put(pod("b", job="k", version=2))
    assert store.of_job(("ns", "j")) == []
    assert store.job_of(("ns", "e")) is None


def test_facts_are_kept_and_told_when_they_change() -> None:
    told: list[tuple[str | None, str | None]] = []
    store: Store[str] = Store(
        trim_metadata,
        lambda obj: str(obj["status"].get("phase")),
        lambda key, before, after: told.append((before, after)),
    )
    store.put(pod(version=1, phase="Pending"))
    store.put(pod(version=2, phase="Pending", message="another word"))
    store.put(pod(version=3, phase="Running"))
    assert list(store.summaries()) == [(("ns", "p"), "Running")]
    store.remove(("ns", "p"), 4)
    assert told == [(None, "Pending"), ("Pending", "Running"), ("Running", None)]


def test_after_a_restored_backup_older_versions_are_believed() -> None:
    store: Store[None] = Store(trim_metadata)
    store.put(pod(version=100, phase="Running"))
    store.remove(("ns", "gone"), 100)
    store.forget_versions()
    assert store.put(pod(version=5, phase="Pending"))
    assert store.put(pod("gone", version=6))


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.sampled_from(["j", "k", None])), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_order_of_arrival_ends_in_the_newest_state(
    history: list[tuple[bool, str, str | None]], chance: random.Random
) -> None:
    """Each step is the API server's; the store sees them all, but shuffled, as a watch and late answers would."""
    steps: list[tuple[int, Key, Object | None]] = [
        (version, ("ns", name), pod(name, version, job) if exists else None)
        for version, (exists, name, job) in enumerate(history, 1)
    ]
    newest = {key: obj for _, key, obj in steps}
    shuffled = list(steps)
    chance.shuffle(shuffled)
    store: Store[None] = Store(trim_metadata)
    for version, key, obj in shuffled:
        if obj is None:
            store.remove(key, version)
        else:
            store.put(obj)
    assert set(store) == {key for key, obj in newest.items() if obj}
    for job in ("j", "k"):
        expected = sorted(
            key[1] for key, obj in newest.items() if obj and obj["metadata"].get("labels", {}).get(JOB_LABEL) == job
        )
        assert [each["metadata"]["name"] for each in store.of_job(("ns", job))] == expected


def test_what_is_not_read_of_children_is_not_kept() -> None:
    metadata = {"name": "x", "namespace": "ns"}
    template = {"containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": "1"}}, "env": []}]}
    status = {"phase": "Running"}
    whole = {"metadata": metadata, "spec": template | {"nodeName": "n", "volumes": []}, "status": status}
    assert trim_pod(whole)["spec"] == {
        "nodeName": "n",
        "containers": [{"name": "c", "resources": {"limits": {"cpu": "1"}}}],
    }
    ray_job = {"metadata": dict(metadata), "spec": {"suspend": True, "rayClusterSpec": template}, "status": status}
    assert trim_ray_job(ray_job) == {"metadata": metadata, "spec": {"suspend": True}, "status": status}
    assert trim_kube_job({"metadata": dict(metadata), "spec": {"template": template}})["spec"] == {}
