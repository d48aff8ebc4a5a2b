"""The API server as a user of a kubeconfig sees it: plain dicts, and every refusal as a sentence.

The synchronous client of the library is used, since it starts in a third of the other one's time.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import urllib3
import yaml
from kubernetes import config
from kubernetes.client import ApiClient, Configuration

from finetune_api.base import API_VERSION, GROUP
from finetune_api.errors import FinetuneError
from finetune_operator.children.labels import JOB_LABEL
from finetune_operator.clock import ServerClock

Json = dict[str, Any]

PLURAL: Final = "finetunejobs"
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_JSON: Final = "application/json"
_MERGE: Final = "application/merge-patch+json"
_NAMES_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_FIRST_NAMES: Final = 500  # among which a name is looked for that the user may have meant
_UNANSWERED: Final = 0
# Reads only: an answer to a write may be lost although the write was done.
_RETRIES: Final = urllib3.Retry(
    total=3,
    backoff_factor=0.3,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods={"GET"},
    raise_on_status=False,
)


class ClusterError(FinetuneError):
    """The API server refused a request, or did not answer. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, what: str, *, where: str = "", hint: str = "", status: int = _UNANSWERED) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status

    @property
    def passing(self) -> bool:
        """The same request may succeed later with nothing changed by anyone."""
        return self.status in (_UNANSWERED, 429) or self.status >= 500


class Cluster:
    """A cluster, and the namespace that is meant when none is named. Made by `connect`.

    Every method raises ClusterError with a sentence when the API server refuses or does not answer.

    Attributes:
        namespace: of the jobs.
        clock: the API server's time, learned from its answers: status and laptop may disagree about the time.
    """

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it warns of, the error says
        self.namespace = namespace
        self.clock = ServerClock()
        self._client = ApiClient(configuration=configuration)
        self._server: str = configuration.host

    def job(self, name: str) -> Json:
        """One FinetuneJob; the error for a missing one says what may have been meant."""
        try:
            return self._read(self._job_path(name))
        except ClusterError as error:
            if error.status != 404:
                raise
            raise self._not_found(name) from error

    def jobs(self, *, everywhere: bool = False) -> list[Json]:
        """The namespace's FinetuneJobs, or those of all namespaces."""
        found: list[Json] = self._read(self._jobs_path(None if everywhere else self.namespace))["items"]
        return found

    def change_job(self, name: str, change: Json) -> Json:
        """Merge patch."""
        path = f"{self._job_path(name)}?fieldManager=kubectl-finetune"
        changed: Json = json.loads(self._send("PATCH", path, body=change, content=_MERGE).data)
        return changed

    def delete_job(self, name: str, uid: str) -> None:
        """Deletes this very job; its children follow."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        self._send("DELETE", self._job_path(name), body=options)

    def pods(self, job: str) -> list[Json]:
        """Pods of all stages of a job."""
        query = urlencode({"labelSelector": f"{JOB_LABEL}={job}"})
        found: list[Json] = self._read(f"/api/v1/namespaces/{quote(self.namespace)}/pods?{query}")["items"]
        return found

    def log(
        self, pod: str, container: str, *, follow: bool, previous: bool, tail: int | None, seconds: int | None
    ) -> Iterator[bytes]:
        """Lines of a container's log, without their ends; with `follow` until the container ends.

        Args:
            tail: that many lines before now; None: all.
            seconds: only what is younger.
        """
        wanted: dict[str, object] = {"container": container, "follow": follow, "previous": previous}
        wanted |= {"tailLines": tail, "sinceSeconds": seconds}
        query = urlencode({key: str(value).lower() for key, value in wanted.items() if value is not None})
        path = f"/api/v1/namespaces/{quote(self.namespace)}/pods/{quote(pod)}/log?{query}"
        answer = self._send("GET", path, stream=True, read_seconds=None if follow else 60)
        rest = b""
        try:
            for part in answer.stream(1 << 16):
                *lines, rest = (rest + part).split(b"\n")
                yield from lines
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unanswered(error) from error
        finally:
            answer.close()
        if rest:
            yield rest

    def _jobs_path(self, namespace: str | None) -> str:
        return f"/apis/{API_VERSION}/{f'namespaces/{quote(namespace)}/' if namespace else ''}{PLURAL}"

    def _job_path(self, name: str) -> str:
        return f"{self._jobs_path(self.namespace)}/{quote(name, safe='')}"

    def _read(self, path: str, accept: str = _JSON) -> Json:
        found: Json = json.loads(self._send("GET", path, accept=accept).data)
        return found

    def _send(
        self,
        verb: str,
        path: str,
        *,
        body: Json | None = None,
        content: str = _JSON,
        accept: str = _JSON,
        stream: bool = False,
        read_seconds: float | None = 20,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "*/*" if stream else accept, "Content-Type": content, "User-Agent": "kubectl-finetune"}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, verb, body)
        sent = self.clock.monotonic()
        try:
            answer = self._client.rest_client.pool_manager.request(
                verb,
                self._server + path,
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=5, read=read_seconds),
                retries=_RETRIES,
                preload_content=not stream,
            )
            self.clock.learn(sent, answer.headers.get("Date"))
            if answer.status >= 400:
                raise refusal(answer.status, answer.data, path)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unanswered(error) from error
        return answer

    def _unanswered(self, error: Exception) -> ClusterError:
        reason = getattr(error, "reason", None) or error
        # urllib3 puts itself and its pool in front of what the system said.
        said = re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(reason)).strip()
        hint = "`kubectl cluster-info` asks the same server; --context or --kubeconfig choose another one"
        return ClusterError(f"the API server at {self._server} does not answer: {said}", hint=hint)

    def _not_found(self, name: str) -> ClusterError:
        """A missing job, with what the user may have meant."""
        where = f"namespace {self.namespace}"
        elsewhere = self._names(f"{self._jobs_path(None)}?{urlencode({'fieldSelector': f'metadata.name={name}'})}")
        if elsewhere:
            hint = f"there is one in namespace {elsewhere[0][0]}: add -n {elsewhere[0][0]}"
        else:
            here = [each for _, each in self._names(f"{self._jobs_path(self.namespace)}?limit={_FIRST_NAMES}")]
            similar = difflib.get_close_matches(name, here, n=3, cutoff=0.6)
            if similar:
                hint = f"did you mean {' or '.join(similar)}?"
            elif here:
                hint = f"there are {', '.join(here[:5])}{f' and {len(here) - 5} more' if len(here) > 5 else ''}"
            else:
                hint = "there is no job at all; -n chooses another namespace, `kubectl finetune status -A` shows all"
        return ClusterError(f"there is no FinetuneJob {name} in {where}", hint=hint, status=404)

    def _names(self, path: str) -> list[tuple[str, str]]:
        """Namespaces and names of the jobs of a list; none when it may not be read."""
        try:
            items = self._read(path, _NAMES_ONLY)["items"] or []
        except ClusterError:
            return []
        return [(item["metadata"]["namespace"], item["metadata"]["name"]) for item in items]


def connect(kubeconfig: str | None, context: str | None, namespace: str | None) -> Cluster:
    """The cluster that kubectl would use with these flags.

    Raises:
        FinetuneError: there is no configuration, or it cannot be used.
    """
    configuration = type.__call__(Configuration)  # the class's own call would hand out a shared default
    files = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    found = any(Path(file).expanduser().is_file() for file in files.split(os.pathsep) if file)
    try:
        if not found and not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(configuration)
            return Cluster(configuration, namespace or _SERVICE_ACCOUNT.read_text(encoding="utf-8").strip())
        if not found:
            hint = "name a kubeconfig file with --kubeconfig or KUBECONFIG, or ask your admin for one"
            raise FinetuneError(f"there is no cluster to talk to: no file {files}", hint=hint)
        config.load_kube_config(files, context, configuration, persist_config=False)
        return Cluster(configuration, namespace or _namespace_of(files, context))
    except (config.ConfigException, OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        # The library finds out by TypeError or AttributeError that a file is YAML and no kubeconfig.
        hint = "`kubectl config get-contexts` lists what there is"
        raise FinetuneError(f"{files} cannot be used: {error}", hint=hint) from error


def _namespace_of(files: str, context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts(files)
    chosen: Json = next((each for each in contexts if each["name"] == context), active)
    return str((chosen.get("context") or {}).get("namespace") or "default")


def refusal(status: int, body: bytes, path: str) -> ClusterError:
    """An answer of the API server that is an error, as a sentence. `path` is what was asked for."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        answer = {"message": body.decode("utf-8", "replace").strip()[:300]}
    said = str(answer.get("message") or "it does not say why")
    if status == 404 and path.startswith(f"/apis/{GROUP}") and not (answer.get("details") or {}).get("name"):
        hint = "its admin installs it; --context chooses another cluster"
        return ClusterError("this cluster has no FinetuneJobs: finetune is not installed", hint=hint)
    if status == 401:
        hint = "sign in again; `kubectl auth whoami` shows whether it worked"
        return ClusterError("the API server does not accept your sign-in", hint=hint, status=status)
    if status == 403:
        return _forbidden(said)
    if status == 429 or status >= 500:
        return ClusterError(f"the API server cannot do it now: {said}", hint="try again", status=status)
    return ClusterError(said, status=status)


def _forbidden(said: str) -> ClusterError:
    match = re.search(
        r'User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
        r'(?: in the namespace "(?P<namespace>[^"]+)")?',
        said,
    )
    if not match:
        return ClusterError(f"the API server forbids it: {said}", hint="ask the cluster's admin", status=403)
    user, verb, resource, group, namespace = match.group("user", "verb", "resource", "group", "namespace")
    where = f"in namespace {namespace}" if namespace else "in all namespaces"
    full = f"{resource.partition('/')[0]}{f'.{group}' if group else ''}"
    full += f" --subresource={resource.partition('/')[2]}" if "/" in resource else ""
    flag = f"-n {namespace}" if namespace else "-A"
    hint = f"ask the cluster's admin for this right; `kubectl auth can-i {verb} {full} {flag}` says when you have it"
    return ClusterError(f"{user} may not {verb} {resource} {where}", hint=hint, status=403)
