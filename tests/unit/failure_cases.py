"""Bad ends and stages that do not get on, as they look to the operator: one row, one story.

Words of Kubernetes and KubeRay are as their sources write them (Kubernetes 1.34, KubeRay 1.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.job import FinetuneJobSpec
from finetune_api.stage import ProgressReport, StageFailure, StageReport
from finetune_api.status import FailureReason, Plan
from finetune_operator.failures import Evidence
from finetune_operator.observe import BatchJob, Block, Pod, RayJob, Stop
from tests.unit.api_cases import JOB, changed


def spec(**changes: Any) -> FinetuneJobSpec:
    """A valid spec with the values at dotted paths (`__` for the dot) changed."""
    paths = {f"spec.{path.replace('__', '.')}": value for path, value in changes.items()}
    document = changed(JOB, {"spec.workers": {"count": 4, "gpusEach": 8}, **paths})
    return FinetuneJobSpec.model_validate(document["spec"], by_alias=True, by_name=False)


HEAD = Pod(
    name="chat-a1-head", uid="1", stage="train", attempt=1, role="head", node="cpu-1", ip="10.0.0.1", phase="Running",
    created=0.0, scheduled=1.0, ended=None, deleting=None, gpus=0, reason="", message="", waiting=None,
    unschedulable=None, disrupted=None, stops=(),
)  # fmt: skip
WORKER = replace(HEAD, name="chat-a1-worker-3", uid="2", role="worker", node="gpu-7", gpus=8)
PREPARE = replace(HEAD, name="chat-prepare-x7k2p", uid="3", stage="prepare", attempt=None, role="other", node="cpu-2")
RESULT = replace(PREPARE, name="chat-result-b5m9z", uid="4", stage="result")
RAY_JOB = RayJob(
    name="chat-a1", uid="5", attempt=1, created=0.0, deleting=None, foreign=False, suspended=False,
    deployment="Failed", outcome="FAILED", reason="AppFailed", message="", cluster="chat-a1-x",
    cluster_trouble="",
)  # fmt: skip
BATCH_JOB = BatchJob(
    name="chat-prepare", uid="6", created=0.0, deleting=None, foreign=False, complete=False,
    failed=Block("BackoffLimitExceeded", "Job has reached the specified backoff limit"),
)  # fmt: skip
PLAN = Plan(total_steps=1000, gpu_memory_bytes=63_800_000_000)


def ended(pod: Pod, exit_code: int, reason: str = "Error", message: str = "", **fields: Any) -> Pod:
    """The pod after its container ended."""
    container = {"head": "ray-head", "worker": "ray-worker", "other": "stage"}[pod.role]
    stop = Stop(container, exit_code, reason, message)
    return replace(pod, **{"phase": "Failed", "ended": 90.0, "stops": (stop,), **fields})


def disrupted(pod: Pod, why: str, words: str, **fields: Any) -> Pod:
    """The pod while it is taken away."""
    return replace(pod, **{"disrupted": Block(why, words), "deleting": 80.0, **fields})


def evicted(pod: Pod, message: str) -> Pod:
    return replace(pod, phase="Failed", ended=85.0, reason="Evicted", message=message,
                   disrupted=Block("TerminationByKubelet", message))  # fmt: skip


def told(reason: FailureReason, message: str, *, attempt: int = 1, **fields: Any) -> ProgressReport:
    """A head's report of a failed attempt."""
    failure = StageFailure(reason=reason, message=message, **fields)
    return ProgressReport(attempt=attempt, state="failed", age=1.0, step=120, total_steps=1000, failure=failure)


def driver(exit_code: int, log: str = "") -> RayJob:
    """A RayJob as Ray words it when the driver ended."""
    words = f", last available logs (truncated to 20,000 chars):\n{log}" if log else ". No logs available."
    return replace(RAY_JOB, message=f"Job entrypoint command failed with exit code {exit_code}{words}")


@dataclass(frozen=True)
class Case:
    """What is seen after a bad end, and the class that it must get."""

    story: str
    reason: FailureReason
    stage: str = "train"
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def evidence(self) -> Evidence:
        return Evidence(**{"stage": self.stage, "spec": spec(), **self.rest})


def train(story: str, reason: FailureReason, *pods: Pod, **rest: Any) -> Case:
    return Case(story, reason, "train", {"pods": pods, "ray_job": RAY_JOB, **rest})


def prepare(story: str, reason: FailureReason, *pods: Pod, **rest: Any) -> Case:
    return Case(story, reason, "prepare", {"pods": pods, "batch_job": BATCH_JOB, **rest})


_PEER = "collective allreduce failed: Connection closed by peer [10.0.0.9]:41234"
_LOW_MEMORY = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi. "
_TOO_MUCH = "Container ray-worker was using 34Gi, request is 32Gi, has larger consumption of memory. "
_NO_COMMAND = 'exec: "finetune": executable file not found in $PATH'
_CUDA_FULL = (
    "the GPU's memory is full in step 121, at 138.9 GiB\n  → lower training.microBatch or data.sequenceLength, set "
    "training.activationCheckpointing, use more workers with deepspeed.zeroStage 3, or deepspeed.offload"
)
_GPU_SPECS = {"spec": spec(training__microBatch=4, data__sequenceLength=8192), "plan": PLAN}
_OFFLOADED = spec(deepspeed={"zeroStage": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}})
_ON_CPUS = spec(workers={"count": 2, "cpusEach": 2}, training__microBatch=4)

ENDS: Sequence[Case] = (
    # what the trainer saw itself
    train("rank out of GPU memory", "OutOfGpuMemory", HEAD, WORKER, ray_job=driver(6),
          report=told("OutOfGpuMemory", _CUDA_FULL, rank=3, node="gpu-7"), **_GPU_SPECS),
    train("trainer says out of GPU memory and no more", "OutOfGpuMemory", HEAD, ray_job=driver(6),
          report=told("OutOfGpuMemory", "the GPU's memory is full in step 121", rank=3), **_GPU_SPECS),
    train("unexpected exception: CUDA out of memory", "OutOfGpuMemory", HEAD, ray_job=driver(6), plan=PLAN,
          report=told("Unknown", "training failed with OutOfMemoryError: CUDA out of memory", rank=3)),
    train("loss not finite", "Numerics", HEAD, ray_job=driver(6),
          report=told("Numerics", "the loss of step 121 is not finite; lower training.learningRate or raise warmup")),
    train("bucket refuses a checkpoint", "Storage", HEAD, ray_job=driver(5),
          report=told("Storage", "s3://models/chat: AWS Error ACCESS_DENIED; check that the credentials may write")),
    train("collective never ends", "Hang", HEAD, WORKER, ray_job=driver(6),
          report=told("Hang", "no step for 1,800 s: rank 5 did not join all_gather", rank=5, node="gpu-9")),
    train("network, and every pod is well", "Network", HEAD, WORKER, ray_job=driver(6),
          report=told("Network", _PEER, rank=0, node="gpu-4")),
    train("gate missed", "GateMissed", HEAD, ray_job=driver(8),
          report=told("GateMissed", "the evaluation loss is 1.9, at most 1.5 was asked; the weights are kept aside")),
    train("trainer stopped for a preemption notice", "Preempted", HEAD, ray_job=driver(130),
          report=told("Preempted", "stopped after the checkpoint of step 120: the node is to be reclaimed")),
    prepare("bad row", "UserData", ended(PREPARE, 3), stage_report=StageReport(failure=StageFailure(
        reason="UserData", message="s3://rows/train.jsonl:17: field messages: is not a list; write it as a list"))),
    prepare("no chat template", "UserCode", ended(PREPARE, 4), stage_report=StageReport(failure=StageFailure(
        reason="UserCode", message="hf://org/name@main has no chat template; choose an instruct model"))),
    # memory
    train("OOM on one worker, all others see a closed connection", "OutOfHostMemory", HEAD,
          ended(WORKER, 137, "OOMKilled"), ray_job=driver(6), report=told("Network", _PEER, rank=0, node="gpu-4")),
    train("OOM on a worker with everything offloaded", "OutOfHostMemory", HEAD, ended(WORKER, 137, "OOMKilled"),
          spec=_OFFLOADED),
    train("OOM on a worker on CPUs", "OutOfHostMemory", HEAD, ended(WORKER, 137, "OOMKilled"), spec=_ON_CPUS),
    train("OOM on a restarted worker, an earlier one was preempted", "OutOfHostMemory", HEAD,
          ended(WORKER, 137, "OOMKilled", deleting=None),
          disrupted(replace(WORKER, name="chat-a1-worker-1", node="spot-1"), "PreemptionByScheduler",
                    "default-scheduler: preempting to accommodate a higher priority pod", ended=10.0)),
    prepare("OOM while preparing", "OutOfHostMemory", ended(PREPARE, 137, "OOMKilled")),
    train("evicted, and it used more memory than it asked for", "OutOfHostMemory", HEAD,
          evicted(WORKER, _LOW_MEMORY + _TOO_MUCH)),
    train("bus error", "OutOfSharedMemory", HEAD, ended(WORKER, 135)),
    train("evicted for /dev/shm", "OutOfSharedMemory", HEAD,
          evicted(WORKER, 'Usage of EmptyDir volume "shared-memory" exceeds the limit "8Gi". ')),
    train("out of memory, in the log only", "OutOfHostMemory", HEAD,
          ray_job=driver(6, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 GiB")),
    # taken away
    train("preempted by the scheduler, driver exit 1", "Preempted", HEAD, disrupted(
        WORKER, "PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"),
        ray_job=driver(1)),
    train("drained", "Preempted", disrupted(HEAD, "EvictionByEvictionAPI", "Eviction API: evicting"), WORKER),
    train("spot node is reclaimed with notice", "Preempted", HEAD, disrupted(
        WORKER, "TerminationByKubelet", "Pod was terminated in response to imminent node shutdown.",
        reason="Terminated"), report=told("Network", _PEER, rank=0)),
    train("preempted by the kubelet for a critical pod", "Preempted", HEAD, disrupted(
        WORKER, "TerminationByKubelet", "Pod was preempted by Kubelet to accommodate a critical pod.",
        reason="Preempting")),
    train("tainted spot node that is still ready", "Preempted", HEAD, disrupted(
        WORKER, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")),
    train("preempted pod that is killed in its checkpoint", "Preempted", HEAD, ended(disrupted(
        WORKER, "PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"),
        137, "OOMKilled")),
    train("node not ready, taint manager", "Node", HEAD, disrupted(
        WORKER, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
        lost_nodes=frozenset({"gpu-7"})),
    train("node removed", "Node", HEAD, disrupted(WORKER, "DeletionByPodGC", "PodGC: node no longer exists")),
    train("node lost and its head pod with it", "Node", lost_nodes=frozenset({"cpu-1"}),
          ray_job=replace(RAY_JOB, message="Ray head pod not found.")),
    train("node of the head is silent, KubeRay says nothing yet", "Node", HEAD, WORKER,
          ray_job=replace(RAY_JOB, outcome="RUNNING", deployment="Running", reason=""),
          lost_nodes=frozenset({"cpu-1"})),
    train("GPU marked as broken", "Node", HEAD, disrupted(
        WORKER, "DeletionByDeviceTaintManager", "Device Taint manager: deleting due to NoExecute taint")),
    train("evicted for a neighbour's memory", "Node", HEAD, evicted(WORKER, _LOW_MEMORY)),
    train("container that nobody could find again", "Node", HEAD, ended(WORKER, 137, "ContainerStatusUnknown")),
    train("turned away by the device plugin", "Node", HEAD, replace(
        WORKER, phase="Failed", ended=3.0, reason="UnexpectedAdmissionError",
        message="Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy "
        "devices nvidia.com/gpu, which is unexpected")),
    train("broken GPU, in the log only", "Node", HEAD,
          ray_job=driver(6, "CUDA error: uncorrectable ECC error encountered")),
    # disk
    train("scratch disk full", "Storage", HEAD,
          evicted(WORKER, 'Usage of EmptyDir volume "scratch" exceeds the limit "100Gi". ')),
    prepare("node's disk full", "Storage", evicted(PREPARE, (
        "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 8Gi. Container stage "
        "was using 91Gi, request is 0, has larger consumption of ephemeral-storage. "))),
    # exit codes, when nobody found words
    prepare("exit code 2", "UserCode", ended(PREPARE, 2)),
    prepare("exit code 3", "UserData", ended(PREPARE, 3)),
    prepare("exit code 4", "UserCode", ended(PREPARE, 4)),
    train("exit code 5", "Storage", HEAD, ray_job=driver(5)),
    train("exit code 6 and no log", "Unknown", HEAD, ray_job=driver(6)),
    train("exit code 6 and NCCL in the log", "Network", HEAD,
          ray_job=driver(6, "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690")),
    train("exit code 6 and NCCL's watchdog in the log", "Hang", HEAD,
          ray_job=driver(6, "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=42, OpType=ALLREDUCE)")),
    train("exit code 7", "Unknown", HEAD, ray_job=driver(7)),
    train("exit code 8", "GateMissed", HEAD, ray_job=driver(8)),
    train("driver killed by a signal", "Unknown", HEAD, ray_job=driver(-9)),
    train("driver told to stop by nobody", "Unknown", HEAD, ray_job=driver(143)),
    train("worker pod killed and nobody says by whom", "Unknown", HEAD, ended(WORKER, 137)),
    Case("result cannot be read back", "Storage", "result", {"pods": (ended(RESULT, 5),), "batch_job": BATCH_JOB}),
    # image
    train("image without the command", "Image",
          ended(HEAD, 128, "StartError", f"failed to create containerd task: {_NO_COMMAND}")),
    prepare("command not found", "Image", ended(PREPARE, 127)),
    # KubeRay
    train("image of the head cannot be pulled until the deadline", "Image", replace(
        HEAD, phase="Pending", waiting=Block("ImagePullBackOff", 'Back-off pulling image "registry.example.com/t:2"')),
        ray_job=replace(RAY_JOB, outcome="", reason="PreRunningDeadlineExceeded")),
    train("no node until the deadline", "Unschedulable", HEAD, replace(
        WORKER, node="", phase="Pending", scheduled=None,
        unschedulable="0/5 nodes are available: 5 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available: 5 "
        "No preemption victims found for incoming pod."),
        ray_job=replace(RAY_JOB, outcome="", reason="PreRunningDeadlineExceeded")),
    train("cluster not up until the deadline, silently", "Unschedulable",
          ray_job=replace(RAY_JOB, outcome="", reason="PreRunningDeadlineExceeded")),
    train("job's deadline", "DeadlineExceeded", HEAD, ended(WORKER, 137),
          ray_job=replace(RAY_JOB, outcome="RUNNING", reason="DeadlineExceeded")),
    prepare("job's deadline while preparing", "DeadlineExceeded", batch_job=replace(
        BATCH_JOB, failed=Block("DeadlineExceeded", "Job was active longer than specified deadline"))),
    train("head pod deleted by hand", "Unknown", WORKER,
          ray_job=replace(RAY_JOB, message="Ray head pod not found.")),
    train("stopped is not success", "Unknown", HEAD,
          ray_job=replace(RAY_JOB, deployment="Complete", outcome="STOPPED", reason="", message="")),
    train("driver could not be submitted", "Unknown", HEAD, ray_job=replace(
        RAY_JOB, outcome="", reason="SubmissionFailed",
        message="Ray head pod container ray-job-submitter terminated with exit code 1: Error")),
    train("KubeRay refuses the RayJob", "Unknown", ray_job=replace(
        RAY_JOB, outcome="", deployment="ValidationFailed", reason="ValidationFailed",
        message="the submissionMode must be SidecarMode")),
    train("Ray's supervisor died with its node", "Node", HEAD, lost_nodes=frozenset({"cpu-1"}), ray_job=replace(
        RAY_JOB, message="Job supervisor actor died: The actor died unexpectedly before finishing this task.")),
    train("quota refuses the workers", "Unschedulable", HEAD, ray_job=replace(
        RAY_JOB, outcome="", reason="", deployment="Failed", cluster_trouble='pods "chat-a1-worker" is forbidden: '
        "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=24, limited: "
        "requests.nvidia.com/gpu=24")),
    # nothing to go by
    prepare("Job failed and its pods are gone", "Unknown"),
    train("nothing is known at all", "Unknown", ray_job=None),
)  # fmt: skip


@dataclass(frozen=True)
class Halt:
    """A stage that has not ended and does not get on; its word, and the class if it stays so."""

    story: str
    word: str
    reason: FailureReason
    pods: Sequence[Pod] = ()
    troubles: Sequence[Block] = ()


def waiting(reason: str, message: str, pod: Pod = WORKER) -> Pod:
    return replace(pod, phase="Pending", waiting=Block(reason, message))


def unplaced(message: str, pod: Pod = WORKER) -> Pod:
    return replace(pod, phase="Pending", node="", scheduled=None, unschedulable=message)


_PULL = 'Back-off pulling image "registry.example.com/trainer:2": ErrImagePull: failed to pull and unpack image: '
_CREATING = 'Error creating: pods "chat-prepare-x7k2p" is forbidden: '

HALTS: Sequence[Halt] = (
    Halt("image not there", "ImagePullBackOff", "Image",
         [waiting("ImagePullBackOff", _PULL + "registry.example.com/trainer:2: not found", HEAD), WORKER]),
    Halt("registry wants a login, and the pull secret is missing", "ImagePullBackOff", "Image",
         [waiting("ImagePullBackOff", _PULL + "401 Unauthorized")],
         [Block("FailedToRetrieveImagePullSecret",
                "Unable to retrieve some image pull secrets (registry-login); attempting to pull the image may not "
                "succeed.")]),
    Halt("registry not reached", "ErrImagePull", "Network", [waiting("ErrImagePull", (
        'failed to pull and unpack image "registry.example.com/trainer:2": failed to resolve reference: dial tcp: '
        "lookup registry.example.com: no such host"))]),
    Halt("registry limits pulls", "ImagePullBackOff", "Network", [waiting("ImagePullBackOff", (
        _PULL + "unexpected status from HEAD request to https://registry.example.com/v2/trainer/manifests/2: "
        "429 Too Many Requests"))]),
    Halt("image name that is none", "InvalidImageName", "Image", [waiting("InvalidImageName", (
        'Failed to apply default image tag "registry.example.com/:2": couldn\'t parse image name: invalid reference '
        "format"))]),
    Halt("image never pulled", "ErrImageNeverPull", "Image", [waiting("ErrImageNeverPull", (
        'Container image "trainer:2" is not present with pull policy of Never'))]),
    Halt("secret missing", "CreateContainerConfigError", "Storage",
         [waiting("CreateContainerConfigError", 'secret "bucket-keys" not found', PREPARE)]),
    Halt("key missing in the secret", "CreateContainerConfigError", "Storage", [waiting(
        "CreateContainerConfigError", "couldn't find key AWS_ACCESS_KEY_ID in Secret team-a/bucket-keys", PREPARE)]),
    Halt("secret missing for a volume", "FailedMount", "Storage", [replace(PREPARE, phase="Pending")],
         [Block("FailedMount", 'MountVolume.SetUp failed for volume "storage" : secret "bucket-keys" not found')]),
    Halt("ConfigMap missing for a volume", "FailedMount", "Storage", [replace(PREPARE, phase="Pending")],
         [Block("FailedMount", 'MountVolume.SetUp failed for volume "config" : configmap "chat-prepare" not found')]),
    Halt("no free GPU", "Unschedulable", "Unschedulable", [HEAD, unplaced(
        "0/5 nodes are available: 2 node(s) had untolerated taint {gpu: reserved}, 3 Insufficient nvidia.com/gpu. "
        "preemption: 0/5 nodes are available: 5 No preemption victims found for incoming pod.")]),
    Halt("only tainted nodes", "Unschedulable", "Unschedulable", [unplaced(
        "0/2 nodes are available: 2 node(s) had untolerated taint {gpu: reserved}.")]),
    Halt("no node with the label", "Unschedulable", "Unschedulable", [unplaced(
        "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.")]),
    Halt("model's claim missing", "Unschedulable", "Unschedulable", [unplaced(
        '0/2 nodes are available: persistentvolumeclaim "models" not found.', PREPARE)]),
    Halt("quota", "QuotaExceeded", "Unschedulable", [], [Block("FailedCreate", (
        _CREATING + "exceeded quota: team-a, requested: requests.cpu=4, used: requests.cpu=30, limited: "
        "requests.cpu=32"))]),
    Halt("Pod Security", "PodSecurity", "Unschedulable", [], [Block("FailedCreate", (
        _CREATING + 'violates PodSecurity "restricted:latest": runAsNonRoot != true (pod or container "sidecar" must '
        "set securityContext.runAsNonRoot=true)"))]),
    Halt("webhook refuses", "AdmissionRefused", "Unschedulable", [], [Block("Forbidden", (
        'admission webhook "costs.example.com" denied the request: jobs need the label cost-centre'))]),
    Halt("webhook away", "AdmissionUnavailable", "Unschedulable", [], [Block("InternalError", (
        'Internal error occurred: failed calling webhook "vrayjob.kb.io": failed to call webhook: Post '
        '"https://kuberay.svc:443/": dial tcp 10.0.0.3:443: connect: connection refused'))]),
    Halt("service account missing", "ServiceAccountMissing", "Unschedulable", [], [Block("FailedCreate", (
        _CREATING + 'error looking up service account team-a/trainer: serviceaccount "trainer" not found'))]),
    Halt("priority class missing", "PriorityClassMissing", "Unschedulable", [], [Block("FailedCreate", (
        _CREATING + "no PriorityClass with name training was found"))]),
    Halt("LimitRange", "LimitRange", "Unschedulable", [], [Block("FailedCreate", (
        _CREATING + "maximum memory usage per Container is 16Gi, but limit is 32Gi"))]),
    Halt("namespace goes away", "NamespaceTerminating", "Unschedulable", [], [Block("Forbidden", (
        'rayjobs.ray.io "chat-a1" is forbidden: unable to create new content in namespace team-a because it is being '
        "terminated"))]),
    Halt("KubeRay of another version", "Invalid", "Unknown", [], [Block("Invalid", (
        'RayJob.ray.io "chat-a1" is invalid: spec.submissionMode: Unsupported value: "SidecarMode": supported values: '
        '"K8sJobMode", "HTTPMode", "InteractiveMode"'))]),
    Halt("a refusal among other warnings", "QuotaExceeded", "Unschedulable", [], [
        Block("Unhealthy", "Readiness probe failed"),
        Block("FailedToCreateHeadPod", 'Failed to create head Pod team-a/chat-a1-head, pods "chat-a1-head" is '
              "forbidden: exceeded quota: team-a, requested: pods=1, used: pods=4, limited: pods=4"),
    ]),
    Halt("operator lacks a right", "Forbidden", "Unschedulable", [], [Block("Forbidden", (
        'rayjobs.ray.io is forbidden: User "system:serviceaccount:finetune:operator" cannot create resource "rayjobs" '
        'in API group "ray.io" in the namespace "team-a"'))]),
    Halt("worker that ends again and again", "CrashLoopBackOff", "Unknown", [replace(
        waiting("CrashLoopBackOff", "back-off 5m0s restarting failed container=ray-worker pod=chat-a1-worker-3"),
        stops=(Stop("ray-worker", 1, "Error", ""),))]),
    Halt("no network for the pod", "FailedCreatePodSandBox", "Node", [replace(WORKER, phase="Pending")], [Block(
        "FailedCreatePodSandBox", 'Failed to create pod sandbox: plugin type="calico" failed (add): timed out')]),
    Halt("command that cannot be run", "RunContainerError", "Image", [waiting("RunContainerError", _NO_COMMAND)]),
)  # fmt: skip
