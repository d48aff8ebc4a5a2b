"""A few verbs on objects of an API server, like kubectl's, for tests: `Api(kubeconfig).create(manifest)`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

import urllib3
from kubernetes import config

Object = dict[str, Any]
T = TypeVar("T")
FIELD_MANAGER: Final = "tests"
_JSON: Final = "application/json"
_MERGE: Final = "application/merge-patch+json"
_APPLY: Final = "application/apply-patch+yaml"


class Refused(Exception):
    """The API server answered with an error: its `status` code, `reason` and `message`."""

    def __init__(self, verb: str, path: str, status: int, body: bytes) -> None:
        try:
            answer = json.loads(body)
        except ValueError:
            answer = {"message": body.decode(errors="replace")}
        self.status = status
        self.reason = str(answer.get("reason", ""))
        self.message = str(answer.get("message", ""))
        super().__init__(f"{verb} {path}: {status} {self.reason}: {self.message}")


class Kind(NamedTuple):
    """Where objects of one kind are."""

    prefix: str
    plural: str
    namespaced: bool


class Api:
    """An API server, as the user of a kubeconfig. Close it, or use it in `with`."""

    def __init__(self, kubeconfig: Path) -> None:
        self._client: Any = config.new_client_from_config(str(kubeconfig))
        self.url: str = self._client.configuration.host
        self._kinds: dict[tuple[str, str], Kind] = {}

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.rest_client.pool_manager.clear()

    def request(
        self, verb: str, path: str, body: object = None, content_type: str = _JSON, accept: str = _JSON
    ) -> Object:
        """One request; `body` is an object or a text.

        Raises:
            Refused: the API server answered with an error.
            urllib3.exceptions.HTTPError: there was no answer.
        """
        headers = {"Content-Type": content_type, "Accept": accept}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, verb, body)
        data = None if body is None else body if isinstance(body, str) else json.dumps(body)
        answer = self._client.rest_client.pool_manager.request(
            verb, self.url + path, body=data, headers=headers, timeout=30, retries=urllib3.Retry(False)
        )
        if answer.status >= 400:
            raise Refused(verb, path, answer.status, answer.data)
        whole: Object = json.loads(answer.data) if answer.data.startswith(b"{") else {"text": answer.data.decode()}
        return whole

    def create(self, manifest: Object, *, namespace: str = "", dry_run: bool = False) -> Object:
        """Creates the object and returns it as stored; `dry_run` does all of it but store."""
        where = self._collection(manifest, namespace or manifest["metadata"].get("namespace", ""))
        return self.request("POST", where + "?" + _query(dry_run), manifest)

    def apply(self, manifest: Object, *, namespace: str = "", dry_run: bool = False) -> Object:
        """Server-side apply, taking over fields of others."""
        metadata = manifest["metadata"]
        kind = f"{manifest['apiVersion']}/{manifest['kind']}"
        namespace = namespace or metadata.get("namespace", "")
        return self.apply_text(kind, metadata["name"], json.dumps(manifest), namespace=namespace, dry_run=dry_run)

    def apply_text(self, kind: str, name: str, text: str, *, namespace: str = "", dry_run: bool = False) -> Object:
        """Server-side apply of YAML that is not read here."""
        query = _query(dry_run, force="true")
        return self.request("PATCH", f"{self._at(kind, namespace)}/{name}?{query}", text, _APPLY)

    def get(self, kind: str, name: str, namespace: str = "") -> Object:
        """One object; `kind` is `v1/Pod` or `finetune.dev/v1alpha1/FinetuneJob`."""
        return self.request("GET", f"{self._at(kind, namespace)}/{name}")

    def list(self, kind: str, namespace: str = "", labels: Mapping[str, str] | None = None) -> list[Object]:
        """All objects of a kind, of one namespace if it is given, with all of the labels."""
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        items = self.request("GET", f"{self._at(kind, namespace)}?{urlencode({'labelSelector': selector})}")["items"]
        return list(items)

    def patch(
        self, kind: str, name: str, namespace: str, change: Object, *, status: bool = False, dry_run: bool = False
    ) -> Object:
        """A merge patch on the object, or on its status."""
        path = f"{self._at(kind, namespace)}/{name}{'/status' if status else ''}"
        return self.request("PATCH", f"{path}?{_query(dry_run)}", change, _MERGE)

    def delete(self, kind: str, name: str, namespace: str = "") -> None:
        """Deletes the object, its dependents in the background; that it is gone already is no error."""
        try:
            self.request("DELETE", f"{self._at(kind, namespace)}/{name}?propagationPolicy=Background")
        except Refused as refused:
            if refused.status != 404:
                raise

    def find(self, kind: str, name: str, namespace: str = "") -> Object | None:
        """The object, or None when there is none."""
        try:
            return self.get(kind, name, namespace)
        except Refused as refused:
            if refused.status != 404:
                raise
            return None

    def wait_for(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        until: Callable[[Object], object] = bool,
        seconds: float = 30,
    ) -> Object:
        """The object as soon as there is one for which `until` holds.

        Raises:
            TimeoutError: that took more than `seconds`; the object as it was last is in the message.
        """

        def ask() -> Object | None:
            found = self.find(kind, name, namespace)
            return found if found and until(found) else None

        found = eventually(ask, f"{kind} {namespace}/{name}", seconds, lambda: self.find(kind, name, namespace))
        assert found is not None
        return found

    def wait_gone(self, kind: str, name: str, namespace: str = "", seconds: float = 30) -> None:
        """Returns as soon as there is no such object."""
        eventually(lambda: self.find(kind, name, namespace) is None, f"the end of {kind} {namespace}/{name}", seconds)

    def serves(self, group: str, plural: str) -> bool:
        """Whether any version of the group has this resource."""
        try:
            for version in self.request("GET", f"/apis/{group}")["versions"]:
                resources = self.request("GET", f"/apis/{version['groupVersion']}")["resources"]
                if plural in (resource["name"] for resource in resources):
                    return True
        except Refused as refused:
            if refused.status != 404:
                raise
        return False

    def _collection(self, manifest: Object, namespace: str) -> str:
        return self._at(f"{manifest['apiVersion']}/{manifest['kind']}", namespace)

    def _at(self, kind: str, namespace: str) -> str:
        version, _, name = kind.rpartition("/")
        if (version, name) not in self._kinds:
            prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
            for resource in self.request("GET", prefix)["resources"]:
                if "/" not in resource["name"]:
                    self._kinds[version, resource["kind"]] = Kind(prefix, resource["name"], resource["namespaced"])
        found = self._kinds[version, name]
        return f"{found.prefix}/{f'namespaces/{namespace}/' if found.namespaced and namespace else ''}{found.plural}"


@contextmanager
def fresh_namespace(api: Api) -> Iterator[str]:
    """A new namespace in which pods can be made; its deletion begins when the block is left."""
    made = api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-"}})
    name: str = made["metadata"]["name"]
    try:
        api.wait_for("v1/ServiceAccount", "default", name)
        yield name
    finally:
        api.delete("v1/Namespace", name)


def eventually(ask: Callable[[], T], what: str, seconds: float = 30, state: Callable[[], object] = lambda: "") -> T:
    """The first true answer of `ask`, which is asked every 50 ms.

    Raises:
        TimeoutError: there was none in `seconds`; `state` adds to the message how things are then.
    """
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}: {state()}")
        time.sleep(0.05)
    return answer


def _query(dry_run: bool, **more: str) -> str:
    # Strict: a field that the schema doesn't have is refused, as `kubectl apply` asks for.
    query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | more
    return urlencode(query | ({"dryRun": "All"} if dry_run else {}))
