"""Does what `decide` asked for. Every action can be done again: what is there already, or gone already, is fine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from finetune_api.errors import SpecError
from finetune_api.job import FinetuneJobSpec
from finetune_api.runtime import FinetuneRuntimeSpec
from finetune_operator.actions import (
    Action,
    Delete,
    DeleteSelf,
    ForceDelete,
    MakeAttempt,
    MakePrepare,
    MakePrepareCluster,
    MakeResult,
)
from finetune_operator.children.config import run_config_map
from finetune_operator.children.network import network_policy
from finetune_operator.children.owner import Owner
from finetune_operator.children.prepare import prepare_cluster, prepare_job
from finetune_operator.children.rayjob import ray_job
from finetune_operator.children.result import result_job
from finetune_operator.client import (
    CONFIG_MAPS,
    FINETUNE_JOBS,
    JOBS,
    NETWORK_POLICIES,
    PODS,
    RAY_CLUSTERS,
    RAY_JOBS,
    ApiError,
    Client,
    Object,
    Resource,
)
from finetune_operator.controller import Stores
from finetune_operator.observe import Block, Job, owned
from finetune_operator.settings import Settings

_KINDS: Final[Mapping[str, Resource]] = {"Job": JOBS, "RayCluster": RAY_CLUSTERS, "RayJob": RAY_JOBS}
_KUBERAY_LATER: Final = 60  # KubeRay's own deadline comes after ours, for when no operator is there


class Hindrance(Exception):
    """A child cannot be made, for a reason that is not the API server's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.block = Block(reason, message)


class Performer:
    """Performs actions for jobs; what it makes is put into the stores at once, so that it is not made again."""

    def __init__(self, client: Client, stores: Stores, settings: Settings) -> None:
        self._client, self._stores, self._settings = client, stores, settings

    async def perform(self, job: Job, runtime: FinetuneRuntimeSpec | None, action: Action) -> None:
        """Does one action.

        Raises:
            ApiError: the API server refuses it, or is not there.
            Hindrance: something else is in the way.
        """
        match action:
            case Delete(kind, name, uid):
                if kind == "RayJob":  # its ConfigMap has its name
                    await self._client.delete(CONFIG_MAPS, job.namespace, name)
                await self._client.delete(_KINDS[kind], job.namespace, name, uid=uid)
            case ForceDelete():
                await self.force(job.namespace, action)
            case DeleteSelf():
                await self._client.delete(FINETUNE_JOBS, job.namespace, job.name, uid=job.uid)
            case _:
                assert runtime is not None, "decide starts nothing without a runtime"
                await self._make(job, runtime, action)

    async def force(self, namespace: str, action: ForceDelete) -> None:
        """Ends what KubeRay or a dead node keeps from ending."""
        if action.cluster:
            await self._client.delete(RAY_CLUSTERS, namespace, action.cluster)
        for pod in action.pods:
            await self._client.delete(PODS, namespace, pod, grace_seconds=0)
        try:
            await self._client.patch(
                RAY_JOBS, namespace, action.name, {"metadata": {"uid": action.uid, "finalizers": None}}
            )
        except ApiError as error:
            if not error.not_found and not error.conflict:  # conflict: another one of that name
                raise

    async def _make(
        self,
        job: Job,
        runtime: FinetuneRuntimeSpec,
        action: MakePrepare | MakePrepareCluster | MakeAttempt | MakeResult,
    ) -> None:
        assert job.spec is not None, "decide starts nothing without a spec"
        owner = Owner(job.name, job.namespace, job.uid)
        match action:
            case MakePrepare(workers):
                await self._make_room(owner, job.spec, runtime, workers)
                await self._create(JOBS, prepare_job(owner, job.spec, runtime, workers))
            case MakePrepareCluster(workers):
                await self._make_room(owner, job.spec, runtime, workers)
                await self._create(RAY_CLUSTERS, prepare_cluster(owner, job.spec, runtime, workers))
            case MakeAttempt(number):
                await self._configure(owner, job.spec, runtime, number)
                start = int(self._settings.start_deadline) + _KUBERAY_LATER
                probe = self._settings.probe_address
                made = ray_job(owner, job.spec, runtime, number, start, probe_address=probe)
                await self._create(RAY_JOBS, made)
            case MakeResult(attempt):
                await self._create(JOBS, result_job(owner, job.spec, runtime, attempt))

    async def _make_room(
        self, owner: Owner, spec: FinetuneJobSpec, runtime: FinetuneRuntimeSpec, workers: int | None
    ) -> None:
        """What pods of the stage prepare need before they are there."""
        await self._configure(owner, spec, runtime, "prepare", workers)
        settings = self._settings
        if policy := network_policy(owner, runtime, settings.operator_namespace, settings.scraper_namespaces):
            await self._put(NETWORK_POLICIES, policy, owner)

    async def _configure(
        self,
        owner: Owner,
        spec: FinetuneJobSpec,
        runtime: FinetuneRuntimeSpec,
        stage: Literal["prepare"] | int,
        prepare_workers: int | None = None,
    ) -> None:
        certificates = await self._certificates(runtime)
        try:
            manifest = run_config_map(owner, spec, runtime, stage, certificates, prepare_workers)
        except SpecError as error:
            raise Hindrance("TooLarge", str(error)) from error
        await self._put(CONFIG_MAPS, manifest, owner)

    async def _certificates(self, runtime: FinetuneRuntimeSpec) -> str | None:
        bundle, namespace = runtime.storage.ca_bundle, self._settings.operator_namespace
        if bundle is None:
            return None
        try:
            found = await self._client.get(CONFIG_MAPS, namespace, bundle.name)
        except ApiError as error:
            if not error.not_found:
                raise
            found = {}
        text: str | None = (found.get("data") or {}).get(bundle.key)
        if text is None:
            raise Hindrance(
                "CaBundleMissing",
                f"The runtime's storage.caBundle names key {bundle.key} of ConfigMap {bundle.name} in namespace "
                f"{namespace}, which is not there. The admin must make it.",
            )
        return text

    async def _put(self, resource: Resource, manifest: Object, owner: Owner) -> None:
        """Makes an object, or brings the one that we made before up to date; nobody else's is touched."""
        name = manifest["metadata"]["name"]
        try:
            await self._client.create(resource, owner.namespace, manifest)
        except ApiError as error:
            if not error.already_exists:
                raise
            there = await self._client.get(resource, owner.namespace, name)
            if not owned(there["metadata"], owner.uid):
                message = f"{resource.kind} {name} is there already and belongs to something else; delete it."
                raise Hindrance("NameTaken", message) from error
            await self._client.apply(resource, owner.namespace, name, manifest)

    async def _create(self, resource: Resource, manifest: Object) -> None:
        try:
            made = await self._client.create(resource, manifest["metadata"]["namespace"], manifest)
        except ApiError as error:
            if error.already_exists:
                return
            raise
        stores = self._stores
        store = {RAY_JOBS: stores.ray_jobs, RAY_CLUSTERS: stores.ray_clusters, JOBS: stores.kube_jobs}[resource]
        store.put(made)
