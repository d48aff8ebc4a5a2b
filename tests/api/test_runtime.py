"""Client, watches and the controller's own parts on a real API server, through a proxy that breaks things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_operator import client as client_module
from finetune_operator import reflector as reflector_module
from finetune_operator.client import CONFIG_MAPS, ApiError, Client, Object, Resource
from finetune_operator.reflector import Reflector
from finetune_operator.settings import Settings
from finetune_operator.store import Key, Store, trim_metadata
from tests.api.cluster import Cluster
from tests.api.objects import Api
from tests.api.proxy import Proxy

LABEL = "test.finetune.dev/watched"
GADGETS = Resource("test.finetune.dev", "v1", "gadgets", "Gadget")


@pytest.fixture
def proxy(local_cluster: Cluster) -> Iterator[Proxy]:
    with Proxy(local_cluster.url, local_cluster.ca) as proxy:
        yield proxy


@pytest.fixture
def settings(proxy: Proxy, local_cluster: Cluster, tmp_path: Path) -> Settings:
    path = proxy.kubeconfig(tmp_path / "proxy.kubeconfig", local_cluster.token("admin"))
    return Settings(kubeconfig=str(path), request_timeout=2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches that end, and missing types that are asked for, within seconds."""
    monkeypatch.setattr(reflector_module, "WATCH_SECONDS", (3, 4))
    monkeypatch.setattr(reflector_module, "SILENCE_MARGIN", 1.0)
    monkeypatch.setattr(reflector_module, "RELIST_AGE", 8.0)
    monkeypatch.setattr(reflector_module, "MISSING_RETRY", 0.5)


def config_map(name: str, **data: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {LABEL: "yes"}},
        "data": data,
    }


class Follower:
    """A reflector of the ConfigMaps of a namespace and what it has said."""

    def __init__(self, client: Client, namespace: str, resource: Resource = CONFIG_MAPS) -> None:
        self.changes: list[Key] = []
        self.store: Store[None] = Store(trim_metadata)
        label = LABEL if resource is CONFIG_MAPS else None
        self.reflector = Reflector(
            client, resource, self.store, self.changes.append, label_selector=label, namespace=namespace
        )
        self.namespace = namespace

    def names(self) -> set[str]:
        return {name for _, name in self.store}

    def data(self, name: str) -> Object | None:
        found = self.store.get((self.namespace, name))
        return found and found.get("data")


@asynccontextmanager
async def following(
    settings: Settings, namespace: str, resource: Resource = CONFIG_MAPS
) -> AsyncIterator[tuple[Client, Follower]]:
    async with Client.connect(settings) as client:
        follower = Follower(client, namespace, resource)
        task = asyncio.create_task(follower.reflector.run())
        try:
            yield client, follower
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], object], seconds: float = 20) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


async def call(work: Callable[..., object], *arguments: object) -> None:
    """A call of the tests' own client, which is not asynchronous."""
    await asyncio.to_thread(work, *arguments)


def run(test: Callable[[], Awaitable[None]], seconds: float = 90) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(bounded())


def test_a_store_follows_what_is_made_changed_and_deleted(
    settings: Settings, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE_SIZE", 2)

    async def test() -> None:
        async with Client.connect(settings) as other:
            for number in range(5):
                await other.create(CONFIG_MAPS, namespace, config_map(f"old-{number}"))
            async with following(settings, namespace) as (client, follower):
                await follower.reflector.synced.wait()
                assert follower.names() == {f"old-{number}" for number in range(5)}
                made = await client.create(CONFIG_MAPS, namespace, config_map("new", a="1"))
                await until(lambda: follower.data("new") == {"a": "1"})
                changed = await client.patch(CONFIG_MAPS, namespace, "new", {"data": {"a": "2"}})
                await until(lambda: follower.data("new") == {"a": "2"})
                assert not follower.store.put(made), "an answer that came late"
                assert not follower.store.put(changed), "what the watch has brought already"
                assert await client.delete(CONFIG_MAPS, namespace, "new", uid=made["metadata"]["uid"])
                await until(lambda: follower.data("new") is None)
                assert not follower.store.put(changed), "an answer that came after the deletion"
                assert (namespace, "new") in follower.changes

    run(test)


def test_watches_that_are_cut_lose_nothing(quick: None, proxy: Proxy, settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with following(settings, namespace) as (client, follower):
            await follower.reflector.synced.wait()
            proxy.faults.cut_watches = 0.5
            for number in range(20):
                await client.create(CONFIG_MAPS, namespace, config_map(f"c-{number}"))
                if number % 2:
                    await client.delete(CONFIG_MAPS, namespace, f"c-{number}")
                await asyncio.sleep(0.3)
            await until(lambda: follower.names() == {f"c-{number}" for number in range(0, 20, 2)}, 5)
            assert follower.reflector.age() < reflector_module.RELIST_AGE + 5

    run(test)


def test_a_watch_that_stays_open_and_silent_is_found_within_a_minute(
    proxy: Proxy, settings: Settings, namespace: str, api: Api
) -> None:
    async def test() -> None:
        async with following(settings, namespace) as (client, follower):
            await follower.reflector.synced.wait()
            await client.create(CONFIG_MAPS, namespace, config_map("before"))
            await until(lambda: "before" in follower.names())
            proxy.faults.silent_watches = True
            await asyncio.sleep(0.5)
            await client.create(CONFIG_MAPS, namespace, config_map("unseen"))
            assert await until(lambda: "unseen" in follower.names(), 60) > 1

    run(test)


def test_an_expired_version_leads_to_a_list(quick: None, proxy: Proxy, settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with following(settings, namespace) as (client, follower):
            await client.create(CONFIG_MAPS, namespace, config_map("gone"))
            await until(lambda: "gone" in follower.names())
            proxy.faults.expired_watches, proxy.faults.cut_watches = 2, 0.0
            await client.delete(CONFIG_MAPS, namespace, "gone")
            await until(lambda: proxy.faults.expired_watches == 0)
            proxy.faults.cut_watches = None
            await until(lambda: not follower.names())
            assert proxy.requests["GET", CONFIG_MAPS.path(namespace)] >= 2

    run(test)


def test_a_list_from_the_past_changes_nothing(quick: None, proxy: Proxy, settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with following(settings, namespace) as (client, follower):
            await client.create(CONFIG_MAPS, namespace, config_map("deleted"))
            await until(lambda: "deleted" in follower.names())
            proxy.faults.stale_lists = True
            proxy.faults.expired_watches, proxy.faults.cut_watches = 1, 0.0
            await until(lambda: proxy.faults.expired_watches == 0)
            proxy.faults.cut_watches = None
            await asyncio.sleep(1)
            await client.create(CONFIG_MAPS, namespace, config_map("kept"))
            await client.delete(CONFIG_MAPS, namespace, "deleted")
            await until(lambda: follower.names() == {"kept"})
            proxy.faults.expired_watches, proxy.faults.cut_watches = 1, 0.0
            await until(lambda: proxy.faults.expired_watches == 0)
            await asyncio.sleep(2)
            assert follower.names() == {"kept"}
            assert follower.reflector.failed
            proxy.faults.stale_lists, proxy.faults.cut_watches = False, None
            await until(lambda: not follower.reflector.failed)
            assert follower.names() == {"kept"}

    run(test)


def test_an_outage_is_over_when_the_server_is_back(
    quick: None, proxy: Proxy, settings: Settings, namespace: str, api: Api
) -> None:
    async def test() -> None:
        async with following(settings, namespace) as (client, follower):
            await follower.reflector.synced.wait()
            proxy.faults.away = True
            await until(lambda: follower.reflector.failed)
            with pytest.raises(ApiError) as refused:
                await client.get(CONFIG_MAPS, namespace, "any")
            assert refused.value.retryable
            await call(lambda: api.create(config_map("meanwhile"), namespace=namespace))
            await asyncio.sleep(5)
            assert not follower.names()
            proxy.faults.away = False
            await until(lambda: "meanwhile" in follower.names(), 15)
            assert not follower.reflector.failed

    run(test)


def test_a_type_that_is_installed_later_is_found(quick: None, settings: Settings, namespace: str, api: Api) -> None:
    name = f"{GADGETS.plural}.{GADGETS.group}"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": name},
        "spec": {
            "group": GADGETS.group,
            "scope": "Namespaced",
            "names": {"plural": GADGETS.plural, "kind": GADGETS.kind, "singular": "gadget"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }
    gadget = {"apiVersion": GADGETS.api_version, "kind": GADGETS.kind, "metadata": {"name": "first"}}

    patient = replace(settings, request_timeout=10)  # a new type's first requests may wait for 5 s

    async def test() -> None:
        async with following(patient, namespace, GADGETS) as (client, follower):
            await follower.reflector.synced.wait()
            assert follower.reflector.missing
            await call(lambda: api.create(definition))
            try:
                await until(lambda: not follower.reflector.missing)
                await client.create(GADGETS, namespace, gadget)
                await until(lambda: follower.names() == {"first"})
            finally:
                await call(lambda: api.delete("apiextensions.k8s.io/v1/CustomResourceDefinition", name))
            await until(lambda: follower.reflector.missing)

    run(test)


def test_reads_are_tried_again_and_writes_are_not(proxy: Proxy, settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with Client.connect(settings) as client:
            await client.create(CONFIG_MAPS, namespace, config_map("there"))
            proxy.faults.refused = 1.0
            path = CONFIG_MAPS.path(namespace, "there")
            with pytest.raises(ApiError) as failed:
                await client.get(CONFIG_MAPS, namespace, "there")
            assert failed.value.retryable
            assert proxy.requests["GET", path] == 3
            with pytest.raises(ApiError):
                await client.patch(CONFIG_MAPS, namespace, "there", {"data": {"a": "1"}})
            assert proxy.requests["PATCH", path] == 1

    run(test)


def test_what_the_server_says_is_told_apart(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with Client.connect(settings) as client:
            made = await client.create(CONFIG_MAPS, namespace, config_map("one"))
            with pytest.raises(ApiError) as twice:
                await client.create(CONFIG_MAPS, namespace, config_map("one"))
            assert twice.value.already_exists
            assert not twice.value.conflict
            stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"a": "1"}}
            await client.patch(CONFIG_MAPS, namespace, "one", stale)
            with pytest.raises(ApiError) as conflict:
                await client.patch(CONFIG_MAPS, namespace, "one", stale | {"data": {"a": "2"}})
            assert conflict.value.conflict
            assert not conflict.value.retryable
            applied = await client.apply(CONFIG_MAPS, namespace, "one", config_map("one", a="3"))
            assert applied["data"] == {"a": "3"}
            assert not await client.delete(CONFIG_MAPS, namespace, "one", uid="another")
            assert await client.delete(CONFIG_MAPS, namespace, "one")
            assert not await client.delete(CONFIG_MAPS, namespace, "one")
            with pytest.raises(ApiError) as gone:
                await client.get(CONFIG_MAPS, namespace, "one")
            assert gone.value.not_found

    run(test)


def test_time_is_the_api_servers(settings: Settings, namespace: str) -> None:
    async def test() -> None:
        async with Client.connect(settings) as client:
            client.clock._wall = lambda: 0.0  # this machine's clock, half a century late
            assert client.clock.now() == 0
            made = await client.create(CONFIG_MAPS, namespace, config_map("now"))
            for _ in range(5):
                await client.get(CONFIG_MAPS, namespace, "now")
            created = time.strptime(made["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ")
            assert abs(client.clock.now() - time.mktime(created) + time.timezone) < 5

    run(test)


def test_a_guard_keeps_a_write_from_being_sent(proxy: Proxy, settings: Settings, namespace: str) -> None:
    class NotMine(Exception):
        pass

    async def test() -> None:
        async with Client.connect(settings) as client:
            calls = 0

            def allowed_until_the_connection_stands() -> None:
                nonlocal calls
                calls += 1
                if calls == 2:
                    raise NotMine

            client.guard = allowed_until_the_connection_stands
            with pytest.raises(NotMine):
                await client.create(CONFIG_MAPS, namespace, config_map("never"))
            await client.create(CONFIG_MAPS, namespace, config_map("fine"))
            assert proxy.requests["POST", CONFIG_MAPS.path(namespace)] == 1
            assert calls == 4

    run(test)
