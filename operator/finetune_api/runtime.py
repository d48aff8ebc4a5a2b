"""FinetuneRuntime: what the admin of a cluster allows and provides. Cluster-scoped; users refer to it by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from finetune_api import patterns
from finetune_api.base import Count, Duration, Model, ResourceName, ShortText
from finetune_api.status import Condition

LabelKey = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=317,
        pattern=patterns.LABEL_KEY,
    ),
]
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=patterns.LABEL_VALUE)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Annotations = Annotated[dict[LabelKey, Annotated[str, StringConstraints(max_length=1024)]], Field(max_length=32)]
# An image, with a registry or without; a tag or digest is what makes a run repeatable, but is not forced.
Image = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=patterns.IMAGE)]
MemorySize = Annotated[str, StringConstraints(max_length=16, pattern=patterns.MEMORY_SIZE)]
Cidr = Annotated[
    str,
    StringConstraints(min_length=4, max_length=43, pattern=patterns.CIDR),
]
Endpoint = Annotated[
    str,
    StringConstraints(max_length=512, pattern=patterns.ENDPOINT),
]


class Images(Model):
    """Container images. Users cannot choose one."""

    trainer: Image = Field(description="Image that prepares, trains and reports.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="When it is pulled.")
    pull_secrets: list[ResourceName] = Field(
        default_factory=list, max_length=8, description="Pull secrets; they must exist in the job's namespace."
    )


class Accelerator(Model):
    """The accelerator that workers with gpusEach above 0 ask for."""

    resource_name: LabelKey = Field("nvidia.com/gpu", description="Extended resource of one device.")
    memory_bytes: Count | None = Field(None, description="Memory of one device, in bytes; `plan` uses it.")
    price_per_hour: float | None = Field(
        None, ge=0, le=1_000_000, description="Price of one device for an hour. Without it no cost is shown."
    )
    currency: Annotated[str, StringConstraints(min_length=3, max_length=3, pattern=patterns.CURRENCY)] = Field(
        "USD", description="ISO 4217 code of the price's currency."
    )


class Resources(Model):
    """Host resources of the pods."""

    memory_per_cpu: MemorySize = Field("4Gi", description="Memory that a pod asks for, for each CPU core.")
    shared_memory: MemorySize = Field("8Gi", description="Size of /dev/shm in a worker; part of its memory.")
    scratch: MemorySize = Field("100Gi", description="Local disk of a pod for model, shards and checkpoints.")
    prepare_cpus: float = Field(4, gt=0, le=256, description="CPU cores of each pod that prepares data.")
    prepare_bytes: MemorySize = Field(
        "32Gi",
        description="Most bytes of rows that one pod prepares when a job leaves data.prepare.workers open; compressed "
        "files and Parquet count four times. One pod needs nearly three times as much of `scratch`.",
    )


class Toleration(Model):
    """A taint that pods tolerate (core/v1 Toleration)."""

    key: LabelKey | None = Field(None, description="Taint's key; absent with operator Exists: every taint.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How value is compared.")
    value: LabelValue | None = Field(None, description="Taint's value, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Taint's effect; absent: every effect."
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="With NoExecute: how long it is tolerated, in seconds."
    )


class ConfigMapKey(Model):
    """One key of a ConfigMap in the operator's namespace."""

    name: ResourceName = Field(description="Name of the ConfigMap.")
    key: Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=patterns.FILE_KEY)] = Field(
        "ca.crt", description="Key in it."
    )


class Storage(Model):
    """Object storage for data, checkpoints and weights."""

    endpoint: Endpoint | None = Field(
        None, description="S3 endpoint such as https://minio.storage.svc:9000. Absent: the cloud's own."
    )
    region: ShortText | None = Field(None, description="S3 region.")
    path_style: bool = Field(False, description="Bucket in the path instead of the host name; MinIO needs it.")
    secret_name: ResourceName | None = Field(
        None,
        description="Secret in the job's namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or with "
        "GOOGLE_APPLICATION_CREDENTIALS_JSON, or Azure's keys (docs/storage.md). Absent: the pods' own identity.",
    )
    ca_bundle: ConfigMapKey | None = Field(None, description="Certificates (PEM) that the endpoint is checked with.")
    work_uri: Annotated[str, StringConstraints(max_length=768, pattern=patterns.BUCKET_ADDRESS)] | None = Field(
        None, description="Prefix for shards and checkpoints. Absent: `.finetune/` under the job's output."
    )


class Hub(Model):
    """Where models at hf:// come from. Its token is the key HF_TOKEN of the storage's secret."""

    endpoint: Endpoint | None = Field(None, description="Such as https://hub.example.com. Absent: huggingface.co.")
    mirror_uri: Annotated[str, StringConstraints(max_length=768, pattern=patterns.BUCKET_ADDRESS)] | None = Field(
        None, description="Folder that `finetune mirror` fills; pods then ask no hub."
    )


class RuntimeLimits(Model):
    """The most that one job may ask for. An absent bound does not bind."""

    max_workers: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="Workers.")
    max_gpus: Annotated[int, Field(ge=0, le=65_536)] | None = Field(None, description="Accelerators over all workers.")
    max_active_deadline: Duration | None = Field(
        None, description="Longest life, such as 72h; a job without activeDeadline gets this one."
    )
    max_cost: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="Highest cost; a job without maxCost gets this one. Needs pricePerHour."
    )


class LabelRequirement(Model):
    """One expression over labels (metav1 LabelSelectorRequirement)."""

    key: LabelKey = Field(description="Label's key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="How values are compared.")
    values: list[LabelValue] = Field(default_factory=list, max_length=64, description="For In and NotIn.")


class NamespaceSelector(Model):
    """Namespaces, by their labels (metav1 LabelSelector). Empty: all of them."""

    match_labels: Labels = Field(default_factory=dict, description="Labels that must all be there.")
    match_expressions: list[LabelRequirement] = Field(
        default_factory=list, max_length=16, description="Expressions that must all hold."
    )


class Egress(Model):
    """One destination that training pods may reach."""

    cidr: Cidr = Field(description="Addresses, such as 10.20.0.0/16.")
    ports: list[Annotated[int, Field(ge=1, le=65_535)]] = Field(
        default_factory=list, max_length=16, description="TCP ports; empty: every port."
    )


class NetworkPolicy(Model):
    """What training pods may reach. Other pods of the same job and DNS always are; nothing else is by default."""

    enabled: bool = Field(True, description="Make a NetworkPolicy for each job.")
    egress: list[Egress] = Field(
        default_factory=list, max_length=64, description="Storage and, if models come from there, the hub's mirror."
    )


class FinetuneRuntimeSpec(Model):
    """Where and with what jobs run."""

    images: Images = Field(description="Container images.")
    accelerator: Accelerator = Field(default_factory=Accelerator, description="Accelerator and its price.")
    resources: Resources = Field(default_factory=Resources, description="Memory, shared memory and disk of pods.")
    node_selector: Labels = Field(default_factory=dict, description="Labels of the nodes that workers run on.")
    tolerations: list[Toleration] = Field(default_factory=list, max_length=32, description="Taints workers tolerate.")
    storage: Storage = Field(default_factory=Storage, description="Object storage.")
    hub: Hub = Field(default_factory=Hub, description="Where models at hf:// come from.")
    limits: RuntimeLimits = Field(default_factory=RuntimeLimits, description="The most that one job may ask for.")
    namespaces: NamespaceSelector = Field(
        default_factory=NamespaceSelector, description="Namespaces whose jobs may use it. Empty: all of them."
    )
    network_policy: NetworkPolicy = Field(default_factory=NetworkPolicy, description="What pods may reach.")
    service_account_name: ResourceName | None = Field(
        None,
        description="Service account of the pods, in the job's namespace, for storage identity; no token is mounted.",
    )
    queue_name: ResourceName | None = Field(None, description="Kueue LocalQueue that jobs are queued in.")
    priority_class_name: ResourceName | None = Field(None, description="Priority class of the pods.")
    labels: Labels = Field(default_factory=dict, description="Labels added to every child object.")
    annotations: Annotations = Field(default_factory=dict, description="Annotations added to every child object.")


class FinetuneRuntimeStatus(Model):
    """Whether jobs can use it."""

    observed_generation: Count | None = Field(None, description="metadata.generation that this status is about.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Conditions, one of each type; Ready says whether jobs can use it.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )


class RuntimeMeta(Model):
    """The part of Kubernetes' metadata that is read offline; other fields are kept as they are."""

    model_config = Model.model_config | {"extra": "allow"}

    name: ResourceName = Field(description="Name of the runtime, which jobs refer to.")


class FinetuneRuntime(Model):
    """What the admin allows and provides: images, accelerator and its price, storage, limits, network."""

    api_version: Literal["finetune.dev/v1alpha1"] = Field(description="finetune.dev/v1alpha1")
    kind: Literal["FinetuneRuntime"] = Field(description="FinetuneRuntime")
    metadata: RuntimeMeta = Field(description="Name.")
    spec: FinetuneRuntimeSpec = Field(description="Where and with what jobs run.")
    status: dict[str, Any] | None = Field(None, description="Set by the operator; ignored offline.")
