"""Requests to the API server: plain dicts in and out, on the transport and the sign-in of `kubernetes.aio`.

Reads are tried again, at most twice. Writes are not: the queue brings their key back, and what is to be written is then
decided anew. Before each write, and again when its connection stands, `guard` may refuse it (leader election does).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from finetune_api.base import GROUP, VERSION
from finetune_operator.clock import ServerClock
from finetune_operator.connection import configure, guarded
from finetune_operator.nesting import loads
from finetune_operator.settings import Settings

Object = dict[str, Any]

FIELD_MANAGER: Final = "finetune-operator"
PAGE_SIZE: Final = 500
_READ_RETRIES: Final = 2
_LONGEST_RETRY_AFTER: Final = 10.0
_UNANSWERED: Final = 0
_MERGE: Final = "application/merge-patch+json"
_APPLY: Final = "application/apply-patch+yaml"


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource type of the API server."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """What objects of it say in apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of all objects, those of a namespace, one object, or a part of one such as `status`."""
        parts = ["apis" if self.group else "api", *self.api_version.split("/")]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


FINETUNE_JOBS: Final = Resource(GROUP, VERSION, "finetunejobs", "FinetuneJob")
FINETUNE_RUNTIMES: Final = Resource(GROUP, VERSION, "finetuneruntimes", "FinetuneRuntime", namespaced=False)
RAY_JOBS: Final = Resource("ray.io", "v1", "rayjobs", "RayJob")
RAY_CLUSTERS: Final = Resource("ray.io", "v1", "rayclusters", "RayCluster")
JOBS: Final = Resource("batch", "v1", "jobs", "Job")
PODS: Final = Resource("", "v1", "pods", "Pod")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps", "ConfigMap")
NETWORK_POLICIES: Final = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
EVENTS: Final = Resource("", "v1", "events", "Event")
NAMESPACES: Final = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
NODES: Final = Resource("", "v1", "nodes", "Node", namespaced=False)
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease")
WORKLOADS: Final = Resource("kueue.x-k8s.io", "v1beta1", "workloads", "Workload")


class ApiError(Exception):
    """The API server refused a request, or did not answer.

    Attributes:
        status: HTTP status; 0 when there was no answer, or none that could be read.
        reason: one word for programs, such as NotFound, AlreadyExists, Forbidden, Timeout, Unreachable.
        message: the server's own sentence.
        details: `details` of the server's Status object.
        retry_after: seconds after which the server wants to be asked again.
    """

    def __init__(
        self, status: int, reason: str, message: str, details: Object | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.retry_after = retry_after

    @property
    def not_found(self) -> bool:
        """The object, or its whole resource type, is not there."""
        return self.status == 404

    @property
    def already_exists(self) -> bool:
        """An object of this name is there already."""
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """The object has changed since it was read."""
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def gone(self) -> bool:
        """The resource version or the page is too old; a new list is needed."""
        return self.status == 410

    @property
    def retryable(self) -> bool:
        """The same request may succeed later, with nothing changed by anyone."""
        return self.status in (_UNANSWERED, 429) or self.status >= 500


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the objects of a list."""

    items: list[Object]
    resource_version: str


class Client:
    """One connection pool to one API server. Made by `Client.connect`.

    Attributes:
        clock: the API server's time, learned from its answers.
        guard: called before every write; what it raises keeps the write from being sent.
        count: called with (verb, resource, code) after every request; code is "0" when there was no answer.
    """

    def __init__(self, configuration: Configuration, request_timeout: float, clock: ServerClock) -> None:
        self.clock = clock
        self.guard: Callable[[], None] = lambda: None
        self.count: Callable[[str, str, str], None] = lambda verb, resource, code: None
        self._configuration = configuration
        self._rest = RESTClientObject(configuration)
        self._timeout = request_timeout

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings, clock: ServerClock | None = None) -> AsyncIterator[Client]:
        """A client for the cluster that the settings name; closed on leaving.

        Raises:
            FinetuneError: the cluster's configuration is missing or cannot be read.
        """
        configuration, refresh = await configure(settings)
        client = cls(configuration, settings.request_timeout, clock or ServerClock())
        refreshing = asyncio.create_task(refresh) if refresh else None
        try:
            yield client
        finally:
            if refreshing:
                refreshing.cancel()
            await client._rest.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object, as the API server has it now."""
        return await self._read("get", resource, resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> AsyncIterator[Page]:
        """All objects, in pages that belong to one moment; a page that comes too late raises 410."""
        selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        query = {"limit": str(PAGE_SIZE)} | {name: selector for name, selector in selectors.items() if selector}
        while True:
            answer = await self._read("list", resource, f"{resource.path(namespace)}?{urlencode(query)}")
            meta = answer.get("metadata") or {}
            # The items of a list leave out what the list says once.
            kind = {"apiVersion": resource.api_version, "kind": resource.kind}
            yield Page([kind | item for item in answer.get("items") or []], str(meta.get("resourceVersion", "")))
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        seconds: int,
        silence: float,
        label_selector: str | None = None,
    ) -> AsyncIterator[Object]:
        """Events since a resource version, bookmarks among them, until the server ends the watch after `seconds`.

        Raises:
            ApiError: 410 when the version is too old; Timeout when nothing at all came for `silence` seconds;
                Unreachable when the connection broke.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
        } | ({"labelSelector": label_selector} if label_selector else {})
        timeout = aiohttp.ClientTimeout(total=None, sock_read=silence)
        url = f"{resource.path(namespace)}?{urlencode(query)}"
        try:
            # The answer's head comes at once, though there may be nothing to say yet.
            async with asyncio.timeout(self._timeout):
                response = await self._send("watch", resource, "GET", url, timeout=timeout)
        except TimeoutError as error:
            raise _unanswered(error) from error
        try:
            async for line in _lines(response.content):
                event: Object = loads(line)
                if event.get("type") == "ERROR":
                    raise _error_of(event.get("object") or {}, 500)
                yield event
        except (aiohttp.ClientError, OSError, ValueError) as error:  # OSError includes TimeoutError
            raise _unanswered(error) from error
        finally:
            response.close()

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Makes an object; `already_exists` when there is one of its name."""
        url = f"{resource.path(namespace)}?fieldManager={FIELD_MANAGER}"
        return await self._write("create", resource, "POST", url, body)

    async def apply(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Makes or changes an object by server-side apply; fields that others set and we name become ours."""
        url = f"{resource.path(namespace, name)}?fieldManager={FIELD_MANAGER}&force=true"
        return await self._write("apply", resource, "PATCH", url, body, _APPLY)

    async def patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Merge patch. With metadata.resourceVersion in it: `conflict` when the object has changed since."""
        url = f"{resource.path(namespace, name)}?fieldManager={FIELD_MANAGER}"
        return await self._write("patch", resource, "PATCH", url, body, _MERGE)

    async def patch_status(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Merge patch of the status subresource; answers with the whole object."""
        url = f"{resource.path(namespace, name, 'status')}?fieldManager={FIELD_MANAGER}"
        return await self._write("patch_status", resource, "PATCH", url, body, _MERGE)

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
        propagation: str = "Background",
    ) -> bool:
        """Deletes an object; False when it, or with `uid` that very one, was not there."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._write("delete", resource, "DELETE", resource.path(namespace, name), body)
        except ApiError as error:
            if error.not_found or (uid is not None and error.conflict):
                return False
            raise
        return True

    async def _read(self, verb: str, resource: Resource, url: str) -> Object:
        for tried in range(_READ_RETRIES + 1):
            try:
                return await self._answer(verb, resource, "GET", url)
            except ApiError as error:
                if not error.retryable or tried == _READ_RETRIES:
                    raise
                wanted = error.retry_after if error.retry_after is not None else 0.2 * 2**tried
            await asyncio.sleep(min(wanted, _LONGEST_RETRY_AFTER) * (1 + random.random() / 2))
        raise AssertionError("the last try returns or raises")

    async def _write(
        self, verb: str, resource: Resource, method: str, url: str, body: Object, content: str = "application/json"
    ) -> Object:
        with guarded(self.guard):
            return await self._answer(verb, resource, method, url, body, content)

    async def _answer(
        self,
        verb: str,
        resource: Resource,
        method: str,
        url: str,
        body: Object | None = None,
        content: str = "application/json",
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        response = await self._send(verb, resource, method, url, body, content, timeout)
        try:
            answer = loads(await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _unanswered(error) from error
        if not isinstance(answer, dict):
            raise ApiError(_UNANSWERED, "BadAnswer", f"the answer to {method} {url} is no object")
        return answer

    async def _send(
        self,
        verb: str,
        resource: Resource,
        method: str,
        url: str,
        body: Object | None = None,
        content: str = "application/json",
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> aiohttp.ClientResponse:
        """Sends a request and answers once its status is known to be good; the body is still to be read."""
        headers = {"Content-Type": content, "Accept": "application/json", "User-Agent": FIELD_MANAGER}
        auth = (await self._configuration.auth_settings()).get("BearerToken")
        if auth and auth["value"]:
            headers["Authorization"] = auth["value"]
        sent = self.clock.monotonic()
        code = _UNANSWERED
        try:
            answer = await self._rest.request(
                method, self._configuration.host + url, headers=headers, body=body, _request_timeout=timeout
            )
            response: aiohttp.ClientResponse = answer.response
            code = response.status
            self.clock.learn(sent, response.headers.get("Date"))
            if code >= 400:
                raise _refused(response, await response.read())
            return response
        except (aiohttp.ClientError, OSError) as error:
            raise _unanswered(error) from error
        finally:
            self.count(verb, resource.plural, str(code))


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length: aiohttp's own end at 128 KiB, and a job may have ten times that."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line])
            parts.clear()
        parts.append(rest)


def _refused(response: aiohttp.ClientResponse, body: bytes) -> ApiError:
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    if not isinstance(status, dict):  # something between us and the server has answered
        status = {"message": body.decode("utf-8", "replace")[:500]}
    after = response.headers.get("Retry-After", "")
    return _error_of(status, response.status, response.reason or "", float(after) if after.isdigit() else None)


def _error_of(status: Object, code: int, reason: str = "", retry_after: float | None = None) -> ApiError:
    """From a metav1.Status, which has the last word on code and reason."""
    details = status.get("details") if isinstance(status.get("details"), dict) else None
    if retry_after is None and details and details.get("retryAfterSeconds"):
        retry_after = float(details["retryAfterSeconds"])
    return ApiError(
        int(status.get("code") or code),
        str(status.get("reason") or reason.replace(" ", "")),
        str(status.get("message") or "no reason given"),
        details,
        retry_after,
    )


def _unanswered(error: Exception) -> ApiError:
    if isinstance(error, TimeoutError):
        return ApiError(_UNANSWERED, "Timeout", "the API server did not answer in time")
    if isinstance(error, ValueError):
        return ApiError(_UNANSWERED, "BadAnswer", f"the answer cannot be read: {error}")
    return ApiError(_UNANSWERED, "Unreachable", str(error) or type(error).__name__)
