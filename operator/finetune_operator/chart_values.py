"""The Helm chart's values as models: values.schema.json and docs/reference/chart.md are made from them.

The defaults here are those of values.yaml; a test compares them.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Model, ResourceName
from finetune_api.runtime import Annotations, Images, Labels, MemorySize, Toleration
from finetune_api.runtime import FinetuneRuntimeSpec as RuntimeSpec
from finetune_api.runtime import Image as ImageName

Port = Annotated[int, Field(ge=1, le=65_535)]
Text = Annotated[str, StringConstraints(max_length=1024)]
Cpus = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?m?$")]
Flag = Annotated[str, StringConstraints(pattern=r"^[a-z][-a-z]*$")]
Block = dict[str, Any]  # passed on as it is; the API server checks it

# Made by the chart itself, from other values.
OWN_FLAGS: Final = ("namespaces", "scraper-namespaces")


class ImageValues(Model):
    """Image of the operator, and where images come from."""

    registry: Text = Field("registry.example.com", description="Registry, also of the runtimes' default image.")
    repository: Text = Field("finetune/operator", description="The operator's repository in it.")
    trainer_repository: Text = Field("finetune/trainer", description="The trainer's, for runtimes that name no image.")
    tag: Text = Field("", description="Tag of both; empty: the chart's appVersion.")
    digest: Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64})?$")] = Field(
        "", description="Digest of the operator's image; it wins over the tag."
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="When it is pulled.")


class Requests(Model):
    """What the operator's pods ask for. CPU has no limit: a throttled leader may lose its Lease."""

    cpu: Cpus = Field("100m", description="CPU that is asked for.")
    memory: MemorySize = Field("512Mi", description="Memory, request and limit; 10,000 jobs fit into it.")


class RuntimeImages(Images):
    """As in a FinetuneRuntime, but the chart knows an image."""

    trainer: ImageName | None = Field(  # type: ignore[assignment]
        None, description="Image that prepares, trains and reports. Absent: trainerRepository of `image`."
    )


class RuntimeValues(RuntimeSpec):
    """A FinetuneRuntime's spec; the name is the key."""

    images: RuntimeImages = Field(
        default_factory=RuntimeImages, description="Container images. Pull secrets default to `imagePullSecrets`."
    )


class PriorityClass(Model):
    """A PriorityClass, for `priorityClassName` of runtimes."""

    value: Annotated[int, Field(ge=-(2**31), le=1_000_000_000)] = Field(description="Higher goes first.")
    preemption_policy: Literal["PreemptLowerPriority", "Never"] = Field(
        "PreemptLowerPriority", description="Whether pods of lower priority give way."
    )
    description: Text = Field("", description="What it is for.")


class Crds(Model):
    """The resource definitions. They stay when the release is removed, or every job would go with it."""

    install: bool = Field(True, description="Install and upgrade them with the chart.")


class Rbac(Model):
    """Roles and bindings (docs/reference/rbac.md)."""

    create: bool = Field(True, description="Make the operator's roles and bindings.")
    people: bool = Field(True, description="Let `edit` and `admin` write FinetuneJobs, and `view` read them.")


class ServiceAccount(Model):
    """The operator's service account."""

    create: bool = Field(True, description="Make it.")
    name: Annotated[str, StringConstraints(max_length=63)] = Field("", description="Empty: fullnameOverride.")
    annotations: Annotations = Field(default_factory=dict, description="Annotations of it.")


class DisruptionBudget(Model):
    """PodDisruptionBudget of the operator."""

    enabled: bool = Field(True, description="Make it: one replica at a time is evicted.")


class OperatorNetworkPolicy(Model):
    """What the operator's pods may reach, and who reaches them. Those of jobs: `runtimes.*.networkPolicy`."""

    enabled: bool = Field(True, description="Make it.")
    api_server_cidrs: list[Text] = Field(
        default_factory=lambda: ["0.0.0.0/0", "::/0"], description="Addresses of the API server's endpoints."
    )
    api_server_ports: list[Port] = Field(default_factory=lambda: [443, 6443], description="Ports of these.")


class Kuberay(Model):
    """KubeRay is a prerequisite: the operator makes RayJobs."""

    check: bool = Field(
        True, description="Refuse to install without it. Off for `helm template` that does not ask the cluster."
    )


class PodMonitors(Model):
    """PodMonitors of Prometheus Operator, for the operator and for heads of trainings."""

    enabled: bool = Field(False, description="Make them.")
    interval: Annotated[str, StringConstraints(pattern=r"^[0-9]+(ms|s|m)$")] = Field(
        "30s", description="Time between two scrapes."
    )
    labels: Labels = Field(default_factory=dict, description="Labels that your Prometheus selects them by.")


class Rules(Model):
    """The PrometheusRule with the alerts of docs/runbooks.md."""

    enabled: bool = Field(False, description="Make it.")
    disabled: list[Text] = Field(default_factory=list, description="Names of alerts that are left out.")
    labels: Labels = Field(default_factory=dict, description="Labels that your Prometheus selects it by.")
    runbooks: Text = Field(
        "https://git.example.com/finetune/docs/runbooks.md", description="Where people read docs/runbooks.md."
    )


class Dashboards(Model):
    """ConfigMaps with Grafana's dashboards."""

    enabled: bool = Field(False, description="Make them.")
    labels: Labels = Field(
        default_factory=lambda: {"grafana_dashboard": "1"}, description="Labels that Grafana's sidecar selects them by."
    )
    annotations: Annotations = Field(default_factory=dict, description="Such as the sidecar's folder.")


class Monitoring(Model):
    """Prometheus and Grafana."""

    namespaces: list[ResourceName] = Field(
        default_factory=list, description="Where Prometheus is; its pods may scrape the operator and trainings."
    )
    pod_monitors: PodMonitors = Field(default_factory=PodMonitors, description="Scraping.")
    rules: Rules = Field(default_factory=Rules, description="Alerts.")
    dashboards: Dashboards = Field(default_factory=Dashboards, description="Dashboards.")


class Test(Model):
    """`helm test` runs a job of yours to its end."""

    job: Block = Field(
        default_factory=dict, description="spec of a FinetuneJob, in the release's namespace. Empty: there is no test."
    )
    timeout_seconds: Annotated[int, Field(ge=1)] = Field(3600, description="How long it may take.")


class Values(Model):
    """All values of the chart."""

    fullname_override: ResourceName = Field("finetune-operator", description="Name of everything that is made.")
    image: ImageValues = Field(default_factory=ImageValues, description="Images.")
    image_pull_secrets: list[ResourceName] = Field(
        default_factory=list, description="Pull secrets, by name: the operator's here, jobs' in their namespaces."
    )
    namespaces: list[ResourceName] = Field(
        default_factory=list, description="Where jobs may be; the operator has no rights on jobs elsewhere. Empty: all."
    )
    settings: dict[Flag, str | int | float | bool] = Field(
        default_factory=dict, description="Flags of the operator without dashes, such as log-level (operator.md)."
    )
    replicas: Annotated[int, Field(ge=0, le=9)] = Field(2, description="Of which one leads.")
    resources: Requests = Field(default_factory=Requests, description="What a pod asks for.")
    spread: Literal["ScheduleAnyway", "DoNotSchedule"] = Field(
        "ScheduleAnyway", description="DoNotSchedule: replicas are never on one node."
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels of the operator's nodes.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints that it tolerates.")
    affinity: Block = Field(default_factory=dict, description="Its affinity (core/v1 Affinity).")
    priority_class_name: Annotated[str, StringConstraints(max_length=63)] = Field(
        "", description="Priority class of its pods."
    )
    pod_labels: Labels = Field(default_factory=dict, description="Labels added to its pods.")
    pod_annotations: Annotations = Field(default_factory=dict, description="Annotations added to its pods.")
    service_account: ServiceAccount = Field(default_factory=ServiceAccount, description="Its service account.")
    rbac: Rbac = Field(default_factory=Rbac, description="Rights.")
    pod_disruption_budget: DisruptionBudget = Field(default_factory=DisruptionBudget, description="Evictions.")
    network_policy: OperatorNetworkPolicy = Field(
        default_factory=OperatorNetworkPolicy, description="The operator's own network policy."
    )
    crds: Crds = Field(default_factory=Crds, description="Resource definitions.")
    kuberay: Kuberay = Field(default_factory=Kuberay, description="The prerequisite.")
    ca_bundle: Annotated[str, StringConstraints(max_length=262_144)] = Field(
        "", description="Certificates (PEM) that storage is checked with, for runtimes that name no caBundle."
    )
    runtimes: dict[ResourceName, RuntimeValues] = Field(
        default_factory=dict, description="FinetuneRuntimes by name: finetuneruntime.md has every field."
    )
    priority_classes: dict[ResourceName, PriorityClass] = Field(
        default_factory=dict, description="PriorityClasses by name."
    )
    monitoring: Monitoring = Field(default_factory=Monitoring, description="Scraping, alerts and dashboards.")
    test: Test = Field(default_factory=Test, description="`helm test`.")
    global_: Block = Field(default_factory=dict, alias="global", description="Given by a parent chart; not read.")
