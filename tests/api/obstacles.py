"""What stands in a job's way until somebody removes it: one row, one story, each in a namespace of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from tests.api import jobs
from tests.api.lives import NO_GPUS, NO_IMAGE
from tests.api.objects import Api, Object, Refused, eventually
from tests.api.script import Hold, Script, Training

POLICY: Final = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"
WEBHOOK: Final = "admissionregistration.k8s.io/v1/ValidatingWebhookConfiguration"


@dataclass
class Ground:
    """Where an obstacle stands. What is not in the namespace is undone with `stack`."""

    api: Api
    namespace: str
    stack: ExitStack

    def runtime(self, **fields: Any) -> str:
        return self.stack.enter_context(jobs.runtime(self.api, **fields))

    def create(self, kind: str, name: str, **rest: Any) -> None:
        """Creates an object, cluster-scoped ones for as long as the test goes."""
        version, _, word = kind.rpartition("/")
        manifest: Object = {"apiVersion": version, "kind": word, "metadata": {"name": name}} | rest
        self.api.create(manifest, namespace=self.namespace)
        self.stack.callback(self.api.delete, kind, name, self.namespace)

    def delete(self, kind: str, name: str) -> None:
        self.api.delete(kind, name, self.namespace)


Deed = Callable[[Ground], object]
Place = Callable[[Ground], Mapping[str, Any]]


@dataclass(frozen=True)
class Obstacle:
    """A job that cannot go on.

    Attributes:
        reason: that its status gives.
        place: puts the obstacle there; answers with fields of the job (`runtime` for one of its own).
        clear: takes it away, after which the job ends well; None: it goes away by itself.
    """

    story: str
    name: str
    reason: str
    place: Place
    clear: Deed | None = None
    script: Script = field(default_factory=Script)


def _on(**fields: Any) -> Place:
    """The job asks for a runtime with these fields."""
    return lambda ground: {"runtime": ground.runtime(**fields)}


def _makes(kind: str, name: str, **rest: Any) -> Deed:
    return lambda ground: ground.create(kind, name, **rest)


def _unmakes(kind: str, name: str) -> Deed:
    return lambda ground: ground.delete(kind, name)


def _is_there(kind: str, name: str) -> Place:
    def place(ground: Ground) -> Mapping[str, Any]:
        ground.create(kind, name)
        return {}

    return place


def _quota(**hard: str) -> Place:
    def place(ground: Ground) -> Mapping[str, Any]:
        named = {name.replace("__", "/").replace("_", "."): value for name, value in hard.items()}
        ground.create("v1/ResourceQuota", "small", spec={"hard": named})
        kind = "v1/ResourceQuota"
        ground.api.wait_for(kind, "small", ground.namespace, lambda quota: quota.get("status", {}).get("hard") == named)
        return {}

    return place


def _absent(ground: Ground) -> Mapping[str, Any]:
    return {"runtime": f"for-{ground.namespace}"}


def _comes(ground: Ground) -> None:
    ground.runtime(name=f"for-{ground.namespace}")


def _change_runtime(ground: Ground, change: Object) -> None:
    job = ground.api.list(jobs.JOB_KIND, ground.namespace)[0]
    ground.api.patch(jobs.RUNTIME_KIND, job["spec"]["runtimeRef"]["name"], "", {"spec": change})


def _label(ground: Ground) -> None:
    ground.api.patch("v1/Namespace", ground.namespace, "", {"metadata": {"labels": {"team": "chat"}}})


def _selector(ground: Ground) -> Object:
    return {"matchLabels": {"kubernetes.io/metadata.name": ground.namespace}}


_RAY_JOBS: Final = {"apiGroups": ["ray.io"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["rayjobs"]}


def _policy(ground: Ground) -> Mapping[str, Any]:
    words = "Nothing is trained in the week of the audit."
    ground.create(
        POLICY, ground.namespace,
        spec={"matchConstraints": {"resourceRules": [_RAY_JOBS], "namespaceSelector": _selector(ground)},
              "validations": [{"expression": "false", "message": words}]},
    )  # fmt: skip
    ground.create(
        f"{POLICY}Binding", ground.namespace, spec={"policyName": ground.namespace, "validationActions": ["Deny"]}
    )
    probe = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "probe"}, "spec": {}}
    eventually(lambda: _refused(ground, probe, words), "the policy to be in force")
    return {}


def _refused(ground: Ground, probe: Object, words: str) -> bool:
    try:
        ground.api.create(probe, namespace=ground.namespace, dry_run=True)
    except Refused as refused:
        return words in refused.message
    return False


def _webhook(ground: Ground) -> Mapping[str, Any]:
    hook = {
        "name": "audit.example.com", "admissionReviewVersions": ["v1"], "sideEffects": "None", "timeoutSeconds": 2,
        "clientConfig": {"url": "https://127.0.0.1:1/"}, "rules": [_RAY_JOBS], "namespaceSelector": _selector(ground),
    }  # fmt: skip
    ground.create(WEBHOOK, ground.namespace, webhooks=[hook])
    probe = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "probe"}, "spec": {}}
    eventually(lambda: _refused(ground, probe, "failed calling webhook"), "the webhook to be asked")
    return {}


def _held(hold: Hold) -> Script:
    return Script(attempts=(Training(hold=hold),))


OBSTACLES: Final[Sequence[Obstacle]] = (
    Obstacle("the runtime is not there", "no-runtime", "RuntimeMissing", _absent, _comes),
    Obstacle("the runtime is not for this namespace", "stranger", "NamespaceNotAllowed",
             _on(namespaces__matchLabels={"team": "chat"}), _label),
    Obstacle("the job asks for more GPUs than the runtime allows", "greedy", "ExceedsRuntimeLimits",
             _on(limits__maxGpus=1), lambda ground: _change_runtime(ground, {"limits": {"maxGpus": 2}})),
    Obstacle("a cost limit without a price", "unpriced", "PriceMissing",
             lambda ground: {"runtime": ground.runtime(accelerator=None), "limits__maxCost": 5},
             lambda ground: _change_runtime(ground, {"accelerator": {"pricePerHour": 1}})),
    Obstacle("the storage's secret is missing", "no-secret", "FailedMount", _on(storage__secretName="bucket-keys"),
             _makes("v1/Secret", "bucket-keys")),
    Obstacle("the service account is missing", "no-account", "ServiceAccountMissing",
             _on(serviceAccountName="trainer"), _makes("v1/ServiceAccount", "trainer")),
    Obstacle("a quota counts RayJobs", "quota-jobs", "QuotaExceeded", _quota(count__rayjobs_ray_io="0"),
             _unmakes("v1/ResourceQuota", "small")),
    Obstacle("a quota has no room for the workers' GPUs", "quota-gpus", "QuotaExceeded",
             _quota(requests_nvidia_com__gpu="1"), _unmakes("v1/ResourceQuota", "small")),
    Obstacle("a quota has no room for the pod that prepares", "quota-pods", "QuotaExceeded", _quota(pods="0"),
             _unmakes("v1/ResourceQuota", "small")),
    Obstacle("an admission policy refuses the training", "ruled", "AdmissionRefused", _policy,
             lambda ground: ground.delete(f"{POLICY}Binding", ground.namespace)),
    Obstacle("an admission webhook does not answer", "hooked", "AdmissionUnavailable", _webhook,
             lambda ground: ground.delete(WEBHOOK, ground.namespace)),
    Obstacle("a name is taken", "taken", "NameTaken",
             _is_there("v1/ConfigMap", "taken-prepare"), _unmakes("v1/ConfigMap", "taken-prepare")),
    Obstacle("the image does not come for a while", "no-image", "ImagePullBackOff", lambda _: {},
             script=_held(Hold("ImagePullBackOff", NO_IMAGE, "head", seconds=8))),
    Obstacle("GPUs are in use for a while", "no-room", "Unschedulable", lambda _: {},
             script=_held(Hold("Unschedulable", NO_GPUS, "worker", seconds=8))),
)  # fmt: skip
