"""install.yaml on the real API server: who may do what, and that the operator gets by with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from finetune_operator import rights
from finetune_operator.install import NAME, NAMESPACE
from tests.api.attempt import Attempt
from tests.api.cluster import Cluster
from tests.api.jobs import JOB_KIND, RAY_JOB, job, runtime
from tests.api.kubelet import Kubelet
from tests.api.objects import Api, Object, Refused, eventually, fresh_namespace
from tests.api.operator import operator
from tests.api.script import PREPARED, Script, Stage, Training

INSTALL = Path(__file__).parents[2] / "manifests" / "install.yaml"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{NAME}"
ROLE = "rbac.authorization.k8s.io/v1/ClusterRole"
SECRET = "made-later"
OPERATORS = (*rights.IN_JOB_NAMESPACES, *rights.IN_CLUSTER, *rights.IN_OWN_NAMESPACE)

# As `kubectl auth can-i VERB RESOURCE --namespace WHERE` asks. Where: `*` is everywhere, `team` has bound `edit` to
# tenant and `view` to reader, `other` is another team's, `own` the operator's. Resource: PLURAL.GROUP[/PART][:NAME].
CAN_I = """
who       may  verbs                                              resource                                 where
operator  yes  get,list,watch,delete                              finetunejobs.finetune.dev                *
operator  no   create,update,patch,deletecollection               finetunejobs.finetune.dev                *
operator  yes  patch                                              finetunejobs.finetune.dev/status         *
operator  no   get,update                                         finetunejobs.finetune.dev/status         *
operator  no   update,patch                                       finetunejobs.finetune.dev/finalizers     *
operator  yes  list,watch                                         finetuneruntimes.finetune.dev            *
operator  no   get,create,update,patch,delete,deletecollection    finetuneruntimes.finetune.dev            *
operator  no   update,patch                                       finetuneruntimes.finetune.dev/status     *
operator  yes  list,watch,create,patch,delete                     rayjobs.ray.io                           *
operator  no   get,update,deletecollection                        rayjobs.ray.io                           *
operator  no   update,patch                                       rayjobs.ray.io/status                    *
operator  yes  list,watch,create,delete                           rayclusters.ray.io                       *
operator  no   get,update,patch,deletecollection                  rayclusters.ray.io                       *
operator  yes  list,watch,create,delete                           jobs.batch                               *
operator  no   get,update,patch,deletecollection                  jobs.batch                               *
operator  yes  list,watch,delete                                  pods                                     *
operator  no   get,create,update,patch,deletecollection           pods                                     *
operator  no   get                                                pods/log                                 *
operator  no   get,create                                         pods/exec                                *
operator  no   get,create                                         pods/attach                              *
operator  no   get,create                                         pods/portforward                         *
operator  no   patch,update                                       pods/ephemeralcontainers                 *
operator  no   create                                             pods/eviction                            *
operator  no   get,list,watch,create,update,patch,delete          secrets                                  *
operator  no   get,list,watch,create,update,patch,delete          secrets                                  own
operator  yes  get,create,patch,delete                            configmaps                               *
operator  no   list,watch,update,deletecollection                 configmaps                               *
operator  yes  get,create,patch                                   networkpolicies.networking.k8s.io        *
operator  no   list,watch,update,delete,deletecollection          networkpolicies.networking.k8s.io        *
operator  yes  list,create                                        events                                   *
operator  no   get,watch,update,patch,delete                      events                                   *
operator  yes  list                                               workloads.kueue.x-k8s.io                 *
operator  no   get,create,update,patch,delete                     workloads.kueue.x-k8s.io                 *
operator  yes  get                                                namespaces                               *
operator  no   list,watch,create,update,patch,delete              namespaces                               *
operator  yes  get                                                nodes                                    *
operator  no   list,watch,create,update,patch,delete              nodes                                    *
operator  no   get,create                                         nodes/proxy                              *
operator  yes  create                                             leases.coordination.k8s.io               own
operator  yes  get,patch                                          leases.coordination.k8s.io:NAME          own
operator  no   get,patch                                          leases.coordination.k8s.io:another       own
operator  no   list,watch,update,delete                           leases.coordination.k8s.io               own
operator  no   get,create,patch                                   leases.coordination.k8s.io               *
operator  no   create,update,patch,delete                         serviceaccounts                          *
operator  no   create                                             serviceaccounts/token                    *
operator  no   impersonate                                        serviceaccounts                          *
operator  no   impersonate                                        users                                    *
operator  no   impersonate                                        groups                                   *
operator  no   create,update,patch,delete,bind,escalate           roles.rbac.authorization.k8s.io          *
operator  no   create,update,patch,delete                         rolebindings.rbac.authorization.k8s.io   *
operator  no   create,update,patch,delete,bind,escalate           clusterroles.rbac.authorization.k8s.io   *
operator  no   create,update,patch,delete                         clusterrolebindings.rbac.authorization.k8s.io *
operator  no   get,list,create,update,patch,delete                customresourcedefinitions.apiextensions.k8s.io *
operator  no   create,update,patch,delete  validatingwebhookconfigurations.admissionregistration.k8s.io *
operator  no   create,update,patch,delete                         deployments.apps                         *
operator  no   create,update,patch,delete                         persistentvolumeclaims                   *
tenant    yes  get,list,watch,create,update,patch,delete,deletecollection finetunejobs.finetune.dev       team
tenant    no   update,patch                                       finetunejobs.finetune.dev/status         team
tenant    no   get,list,watch,create,update,patch,delete          finetunejobs.finetune.dev                other
tenant    no   get,list,watch,create,update,patch,delete          finetunejobs.finetune.dev                *
tenant    no   get,list,watch,create,update,patch,delete          finetuneruntimes.finetune.dev            *
tenant    no   get,list,watch,create,update,patch,delete          rayjobs.ray.io                           team
tenant    no   get,list,watch,create,update,patch,delete          rayclusters.ray.io                       team
tenant    yes  get                                                pods/log                                 team
tenant    no   get                                                pods/log                                 own
tenant    no   get,list,create,update,patch,delete                configmaps                               own
tenant    no   get,list                                           secrets                                  other
tenant    no   create                                             serviceaccounts/token                    own
tenant    no   get,update,patch                                   leases.coordination.k8s.io:NAME          own
reader    yes  get,list,watch                                     finetunejobs.finetune.dev                team
reader    no   create,update,patch,delete,deletecollection        finetunejobs.finetune.dev                team
reader    yes  get,list,watch                                     finetuneruntimes.finetune.dev            *
reader    no   create,update,patch,delete                         finetuneruntimes.finetune.dev            *
stranger  no   get,list,watch,create,update,patch,delete          finetunejobs.finetune.dev                team
stranger  no   get,list,watch,create,update,patch,delete          finetuneruntimes.finetune.dev            *
stranger  no   get,list                                           configmaps                               own
"""


@dataclass(frozen=True)
class Installed:
    """A cluster with install.yaml applied, the namespaces of two teams, and the people's kubeconfigs."""

    cluster: Cluster
    namespaces: Mapping[str, str]
    people: Mapping[str, Path]


@pytest.fixture(scope="module")
def installed(local_cluster: Cluster, api: Api) -> Iterator[Installed]:
    manifests = [each for each in yaml.safe_load_all(INSTALL.read_text()) if each]
    with ExitStack() as stack:
        for manifest in manifests:
            api.apply(manifest)
            if manifest["kind"] != "CustomResourceDefinition":  # other tests need these
                stack.callback(_delete, api, manifest)
        api.wait_for("v1/ServiceAccount", NAME, NAMESPACE)
        team, other = (stack.enter_context(fresh_namespace(api)) for _ in range(2))
        _bind(api, team, "edit", {"kind": "User", "name": "tenant"})
        reader = {"kind": "ServiceAccount", "name": "default", "namespace": team}
        _bind(api, team, "view", reader)
        stack.callback(_delete, api, _bind(api, "", "finetune-runtime-reader", reader))
        people = {
            "operator": local_cluster.service_account(NAMESPACE, NAME),
            "tenant": local_cluster.user("tenant"),
            "reader": local_cluster.service_account(team, "default"),
            "stranger": local_cluster.user("stranger"),
        }
        for into, role in (("edit", "finetune-editor"), ("view", "finetune-viewer")):
            rules = api.get(ROLE, role)["rules"]
            api.wait_for(ROLE, into, until=partial(_has_rules, rules))
        yield Installed(local_cluster, {"team": team, "other": other, "own": NAMESPACE, "*": ""}, people)


def test_everybody_can_do_what_the_table_says_and_nothing_that_it_denies(installed: Installed) -> None:
    wrong = []
    for who, path in installed.people.items():
        with Api(path) as api:
            for name, may, verbs, resource, where in map(str.split, CAN_I.strip().splitlines()[1:]):
                if name == who:
                    wrong += [
                        f"{who} {'cannot' if may == 'yes' else 'can'} {verb} {resource} in {where}"
                        for verb in verbs.split(",")
                        if _can(api, verb, resource, installed.namespaces[where]) != (may == "yes")
                    ]
    assert wrong == []


def test_the_operator_has_no_right_but_those_in_the_table_of_rights(installed: Installed) -> None:
    for where, of_job in (("team", rights.IN_JOB_NAMESPACES), ("own", OPERATORS)):
        expected = {one for right in (*of_job, *rights.IN_CLUSTER) for one in _each(right.rule())}
        with Api(installed.people["operator"]) as api:
            found = _all_rights(api, installed.namespaces[where])
        with Api(installed.people["stranger"]) as api:
            anybodys = _all_rights(api, installed.namespaces[where])
        assert found - anybodys == expected


def test_the_operators_pods_are_admitted_where_the_restricted_level_is_enforced(installed: Installed, api: Api) -> None:
    template = api.get("apps/v1/Deployment", NAME, NAMESPACE)["spec"]["template"]
    metadata = {"generateName": f"{NAME}-", "labels": template["metadata"]["labels"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    api.create(pod, namespace=NAMESPACE, dry_run=True)
    loose = copy.deepcopy(pod)
    del loose["spec"]["containers"][0]["securityContext"]
    with pytest.raises(Refused, match='violates PodSecurity "restricted:latest"'):
        api.create(loose, namespace=NAMESPACE, dry_run=True)


def test_a_whole_life_uses_every_right_of_the_operator_and_is_refused_none(
    installed: Installed, api: Api, tmp_path: Path
) -> None:
    """The life has everything in it for which there is a right; what is not used here is to be taken away."""
    life = Life(installed, api)

    async def fault(attempt: Attempt) -> None:
        attempt.fail("UserCode", "The model's chat template does not render.")

    with ExitStack() as stack:
        name = stack.enter_context(_strict_runtime(api, life.namespace))
        kubelet = stack.enter_context(Kubelet(installed.cluster))
        script = Script(prepare=Stage(PREPARED, seconds=3), attempts=(Training(load_seconds=3, fault=fault),))
        kubelet.script(life.namespace, life.name, script)
        process = stack.enter_context(
            operator(
                installed.cluster,
                tmp_path,
                kubeconfig=installed.people["operator"],
                flags={"leader-elect": "", "stop-grace": "1s"},
            )
        )
        with Api(installed.people["tenant"]) as tenant:
            whole = job(life.name, name, ttlAfterFinished="5s", data__prepare={"workers": 2})
            tenant.create(whole, namespace=life.namespace)
        life.misses_a_secret_and_is_suspended()
        life.is_refused_by_a_quota()
        life.waits_for_kueue()
        life.fails_and_stays()
        assert process.stop() == 0
    assert life.used() == {one[:3] for right in OPERATORS for one in _each(right.rule())}
    assert _refused(installed.cluster, ACCOUNT, life.since) == []


class Life:
    """A job's life in four acts. Each ends when the operator has made use of the rights that it is about."""

    name = "life"

    def __init__(self, installed: Installed, api: Api) -> None:
        self.namespace = installed.namespaces["team"]
        self.since = len(installed.cluster.audited())
        self._cluster, self._api = installed.cluster, api
        self._attempt = ""

    def used(self) -> set[tuple[str, str, str]]:
        """Group, resource and verb of all that the operator has asked for."""
        return {_asked(line) for line in _of(self._cluster, ACCOUNT, self.since)}

    def misses_a_secret_and_is_suspended(self) -> None:
        """Looks at events; deletes cluster and Job of prepare; makes them again with what is there already."""
        self._until("", "events", "list")
        self._suspend(True)
        self._becomes("Suspended")
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
        self._api.create(quota | {"spec": {"hard": {"count/rayjobs.ray.io": "0"}}}, namespace=self.namespace)
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}}
        self._api.create(secret, namespace=self.namespace)
        self._suspend(False)
        self._api.wait_for("batch/v1/Job", f"{self.name}-prepare", self.namespace, seconds=60)
        self._suspend(True)
        self._becomes("Suspended")
        self._suspend(False)

    def is_refused_by_a_quota(self) -> None:
        """Looks at the job again before it tries again."""
        self._becomes("QuotaExceeded")
        self._until("finetune.dev", "finetunejobs", "get")
        self._api.delete("v1/ResourceQuota", "none", self.namespace)

    def waits_for_kueue(self) -> None:
        """Asks for Kueue's words, of which there are none here."""
        (attempt,) = eventually(lambda: self._api.list(RAY_JOB, self.namespace), "an attempt", 60)
        self._attempt = attempt["metadata"]["name"]
        self._api.patch(RAY_JOB, self._attempt, self.namespace, {"spec": {"suspend": True}})
        self._until("kueue.x-k8s.io", "workloads", "list")
        self._keep(RAY_JOB, self._attempt)
        self._api.patch(RAY_JOB, self._attempt, self.namespace, {"spec": {"suspend": False}})

    def fails_and_stays(self) -> None:
        """Attempt and head do not go when they are deleted, and are made to; the job's time to live ends meanwhile."""
        (head,) = eventually(self._heads, "a head", 60)
        self._keep("v1/Pod", head)
        self._api.wait_gone(JOB_KIND, self.name, self.namespace, 60)
        self._api.wait_gone(RAY_JOB, self._attempt, self.namespace, 90)
        self._api.patch("v1/Pod", head, self.namespace, {"metadata": {"finalizers": None}})

    def _suspend(self, value: bool) -> None:
        self._api.patch(JOB_KIND, self.name, self.namespace, {"spec": {"suspend": value}})

    def _until(self, *right: str) -> None:
        eventually(lambda: right in self.used(), f"a use of {right}", 60)

    def _becomes(self, reason: str) -> None:
        self._api.wait_for(
            JOB_KIND, self.name, self.namespace, lambda found: found.get("status", {}).get("reason") == reason, 60
        )

    def _heads(self) -> list[str]:
        """Names of the head pods that are not about to go."""
        pods = self._api.list("v1/Pod", self.namespace, {"ray.io/node-type": "head"})
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def _keep(self, kind: str, name: str) -> None:
        """Gives an object a finalizer that nobody serves."""
        others = self._api.get(kind, name, self.namespace)["metadata"].get("finalizers", [])
        change = {"metadata": {"finalizers": [*others, "tests.finetune.dev/kept"]}}
        self._api.patch(kind, name, self.namespace, change)


def test_an_operator_for_one_namespace_needs_rights_on_jobs_there_only(
    installed: Installed, api: Api, tmp_path: Path
) -> None:
    """As docs/install.md says it is set up."""
    cluster, team = installed.cluster, installed.namespaces["team"]
    account: Object = {"kind": "ServiceAccount", "name": "narrow", "namespace": NAMESPACE}
    api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "narrow"}}, namespace=NAMESPACE)
    _bind(api, NAMESPACE, NAME, account, kind="Role")
    _bind(api, team, NAME, account)
    seen = len(cluster.audited())
    with ExitStack() as stack:
        stack.callback(_delete, api, _bind(api, "", f"{NAME}-cluster", account))
        name = stack.enter_context(_strict_runtime(api, team))
        kubeconfig = cluster.service_account(NAMESPACE, "narrow")
        stack.enter_context(operator(cluster, tmp_path, team, kubeconfig=kubeconfig, flags={"leader-elect": ""}))
        api.create(job("narrow", name), namespace=team)
        api.wait_for("batch/v1/Job", "narrow-prepare", team)
        api.wait_for("v1/ConfigMap", "narrow-prepare", team)
        api.wait_for("networking.k8s.io/v1/NetworkPolicy", "narrow", team)
        api.wait_for(JOB_KIND, "narrow", team, lambda found: found.get("status", {}).get("phase") == "Preparing")
        api.delete(JOB_KIND, "narrow", team)
    assert _refused(cluster, f"system:serviceaccount:{NAMESPACE}:narrow", seen) == []


@contextmanager
def _strict_runtime(api: Api, namespace: str) -> Iterator[str]:
    """A runtime for this namespace that leads the operator to labels, to certificates of its own and to Kueue."""
    api.patch("v1/Namespace", namespace, "", {"metadata": {"labels": {"finetune.dev/allowed": "true"}}})
    certificates: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "storage-ca"}}
    api.apply(certificates | {"data": {"ca.crt": "-----BEGIN CERTIFICATE-----\n"}}, namespace=NAMESPACE)
    allowed = {"matchLabels": {"finetune.dev/allowed": "true"}}
    storage = {"workUri": "s3://work", "caBundle": {"name": "storage-ca"}, "secretName": SECRET}
    with runtime(api, namespaces=allowed, storage=storage, queueName="team") as name:
        yield name


def _can(api: Api, verb: str, resource: str, namespace: str) -> bool:
    resource, _, name = resource.partition(":")
    resource, _, part = resource.partition("/")
    plural, _, group = resource.partition(".")
    asked = {"verb": verb, "group": group, "resource": plural, "subresource": part, "namespace": namespace}
    asked["name"] = NAME if name == "NAME" else name
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    where = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    allowed: bool = api.request("POST", where, review | {"spec": {"resourceAttributes": asked}})["status"]["allowed"]
    return allowed


def _all_rights(api: Api, namespace: str) -> set[tuple[str, str, str, str]]:
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    where = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    status = api.request("POST", where, review | {"spec": {"namespace": namespace}})["status"]
    assert not status["incomplete"], status
    return {one for rule in status["resourceRules"] for one in _each(rule)}


def _each(rule: Object) -> Iterator[tuple[str, str, str, str]]:
    """Group, resource, verb and name of everything that a rule allows."""
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            for verb in rule["verbs"]:
                for name in rule.get("resourceNames", [""]):
                    yield group, resource, verb, name


def _of(cluster: Cluster, user: str, since: int) -> list[Object]:
    return [line for line in cluster.audited()[since:] if line["user"]["username"] == user]


def _asked(line: Object) -> tuple[str, str, str]:
    about = line["objectRef"]
    target = f"{about['resource']}/{about['subresource']}" if "subresource" in about else about["resource"]
    return about.get("apiGroup", ""), target, line["verb"]


def _refused(cluster: Cluster, user: str, since: int) -> list[str]:
    """What the user asked for without the right to it. A quota's 403 is none of these."""
    return [
        f"{line['verb']} {line['requestURI']}"
        for line in _of(cluster, user, since)
        if line["annotations"]["authorization.k8s.io/decision"] != "allow"
    ]


def _bind(api: Api, namespace: str, role: str, subject: Object, kind: str = "ClusterRole") -> Object:
    group = "rbac.authorization.k8s.io"
    return api.create(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding" if namespace else "ClusterRoleBinding",
            "metadata": {"generateName": "test-"},
            "roleRef": {"apiGroup": group, "kind": kind, "name": role},
            "subjects": [subject if subject["kind"] == "ServiceAccount" else subject | {"apiGroup": group}],
        },
        namespace=namespace,
    )


def _has_rules(rules: list[Object], role: Object) -> bool:
    return all(rule in role["rules"] for rule in rules)


def _delete(api: Api, manifest: Object) -> None:
    metadata = manifest["metadata"]
    api.delete(f"{manifest['apiVersion']}/{manifest['kind']}", metadata["name"], metadata.get("namespace", ""))
