"""Why a stage that has not ended does not get on either, and what the user or the admin can do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from finetune_api.status import FailureReason
from finetune_operator.observe import Block, Pod
from finetune_operator.wording import quote, sentence

_PULLING: Final = (
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "SignatureValidationFailed",
    "RegistryUnavailable",
)
# The words that a stage can be stuck with, and the class to fail with when it still is at its deadline.
WORDS: Final[dict[str, FailureReason]] = {
    **dict.fromkeys(_PULLING, "Image"),
    "RegistryUnavailable": "Network",
    "RunContainerError": "Image",
    "CreateContainerConfigError": "Storage",  # a pod's only secret and claim are its way to the storage
    "FailedMount": "Storage",
    "FailedAttachVolume": "Node",
    "FailedMapVolume": "Node",
    "FailedCreatePodSandBox": "Node",
    "CreateContainerError": "Node",
    "Unschedulable": "Unschedulable",
    "QuotaExceeded": "Unschedulable",
    "LimitRange": "Unschedulable",
    "PodSecurity": "Unschedulable",
    "AdmissionRefused": "Unschedulable",
    "AdmissionUnavailable": "Unschedulable",
    "ServiceAccountMissing": "Unschedulable",
    "PriorityClassMissing": "Unschedulable",
    "NamespaceTerminating": "Unschedulable",
    "Forbidden": "Unschedulable",
    "FailedCreate": "Unschedulable",
    "Invalid": "Unknown",
    "CrashLoopBackOff": "Unknown",
}

TRAIN_SETTINGS: Final = "workers.count, workers.gpusEach, workers.cpusEach"
PREPARE_SETTINGS: Final = "data.prepare.workers"

# How the API server words a refusal: a word of ours for it, and what to do. The first that fits counts.
_REFUSALS: Final[tuple[tuple[str, str, str], ...]] = (
    (
        r"exceeded quota",
        "QuotaExceeded",
        f"Ask for less ({TRAIN_SETTINGS}), or ask the admin to raise the quota",
    ),
    (r"failed quota", "QuotaExceeded", "The quota counts something that the pods do not set; ask the admin"),
    (
        r"violates PodSecurity",
        "PodSecurity",
        "The pods keep to the restricted level, so something changes them; ask the admin which webhook does",
    ),
    (r"failed calling webhook", "AdmissionUnavailable", "The admin must mend or remove that webhook"),
    (
        r"denied the request|ValidatingAdmissionPolicy",
        "AdmissionRefused",
        "Change the job to what that rule allows, or ask the admin",
    ),
    (
        r"[sS]ervice ?account \S+ not found|error looking up service account",
        "ServiceAccountMissing",
        "Create it, or ask the admin to correct the runtime's serviceAccountName",
    ),
    (r"no PriorityClass", "PriorityClassMissing", "The admin must correct the runtime's priorityClassName"),
    (
        r"(maximum|minimum) \S+ usage per|LimitRange",
        "LimitRange",
        "Change workers.cpusEach, or ask the admin to change the namespace's LimitRange",
    ),
    (r"because it is being terminated", "NamespaceTerminating", "The namespace is being deleted"),
    (r"is invalid:", "Invalid", "The operator and the cluster's versions do not fit together; tell the admin"),
    (r"cannot (create|patch|get|list) resource", "Forbidden", "The admin must give the operator this right"),
)

_UNREACHED: Final = "The registry does not answer as it should"
_PULLS: Final[tuple[tuple[str, str], ...]] = (
    (
        r"unauthori[sz]ed|denied|authentication required|forbidden|40[13]\b",
        "The registry wants a login: the pull secrets in the runtime's images.pullSecrets must exist in {where}",
    ),
    (
        r"toomanyrequests|too many requests|429",
        f"{_UNREACHED}: it limits how often it is asked. A login in the runtime's images.pullSecrets often helps",
    ),
    (r"x509|certificate", "The nodes do not trust the registry's certificate; ask the admin"),
    (
        r"no match for platform|no matching manifest|exec format",
        "The image is not built for this node's architecture; ask the admin",
    ),
    (
        r"not found|manifest unknown|no such image|name unknown",
        "The admin must correct the runtime's images.trainer, or push that image",
    ),
    (
        r"registry is unavailable|no such host|dial tcp|timeout|timed out|connection refused|deadline exceeded|i/o|EOF",
        f"{_UNREACHED}, or the node does not reach it; ask the admin if it lasts",
    ),
    (r"no space left", "The node's disk is full; ask the admin"),
    (r"policy of Never|NeverPull", "The runtime's images.pullPolicy is Never and the node does not have the image"),
    (r"InvalidImageName|couldn't parse|invalid reference", "The admin must correct the runtime's images.trainer"),
)
_PULLS_OTHERWISE: Final = "Check the runtime's images.trainer and images.pullSecrets"

_PLACING: Final[tuple[tuple[str, str], ...]] = (
    (
        r"persistentvolumeclaim \S+ not found|unbound immediate PersistentVolumeClaims",
        "Create the claim that the job names, or wait until it is bound",
    ),
    (r"volume node affinity|node\(s\) had volume", "The claim's volume is not reachable from nodes with free room"),
    (
        r"Insufficient",
        f"Wait for room, or ask for less: {TRAIN_SETTINGS}",
    ),
    (
        r"untolerated taint",
        "Ask the admin to add the taint to the runtime's tolerations",
    ),
    (
        r"affinity|selector",
        "Ask the admin whether nodes have the labels of the runtime's nodeSelector",
    ),
)

_MISSING: Final[tuple[tuple[str, str], ...]] = (
    (r"couldn't find key (\S+) in (?:Secret|secret) ", "Add the key {name} to that secret"),
    (r"references non-existent secret key: (\S+)", "Add the key {name} to the secret"),
    (r'secrets? "([^"]+)" not found', "Create the secret {name} in {where}; the runtime's storage.secretName names it"),
    (r'configmaps? "([^"]+)" not found', "The operator made the ConfigMap {name} in {where}; somebody deleted it"),
    (r'persistentvolumeclaims? "([^"]+)" not found', "Create the claim {name} in {where}"),
)


def stuck(
    pods: Sequence[Pod], troubles: Sequence[Block], *, namespace: str = "", settings: str = TRAIN_SETTINGS
) -> Block | None:
    """What keeps a stage that has not ended from getting on; None: nothing that the cluster told.

    Args:
        pods: the stage's pods.
        troubles: the cluster's words on its children, from events and refused creations.
        namespace: the job's, to be named where something is missing in it.
        settings: of the job, by which the stage asks for less.
    """
    where = f"namespace {namespace}" if namespace else "the job's namespace"
    living = sorted((pod for pod in pods if pod.live and pod.deleting is None), key=lambda pod: pod.name)
    waiting = [pod for pod in living if pod.waiting]
    unplaced = [pod for pod in living if pod.unschedulable is not None]
    found: Block | None = None
    if waiting:
        found = _waiting(waiting, troubles, where)
    elif unplaced:
        many = f"{len(unplaced)} of {len(living)} pods find" if len(living) > 1 else f"Pod {unplaced[0].name} finds"
        found = _unplaced(many, unplaced[0].unschedulable or "")
    elif troubles:
        known = (block for block in troubles if block.reason in WORDS or _refusal(block))
        found = _trouble(next(known, troubles[0]), where)
    if found is None:
        return None
    return Block(_word(found.reason), sentence(found.message.replace(TRAIN_SETTINGS, settings)))


def stuck_reason(block: Block) -> FailureReason:
    """The class to fail with when a stage is still stuck by its deadline."""
    if block.reason in _PULLING and _UNREACHED in block.message:
        return "Network"
    return WORDS.get(block.reason, "Unknown")


def _waiting(pods: Sequence[Pod], troubles: Sequence[Block], where: str) -> Block:
    """A container cannot start. The image comes first: it is the same for all pods."""
    pod = min(pods, key=lambda pod: (pod.waiting is None or pod.waiting.reason not in _PULLING, pod.name))
    reason, said = (pod.waiting.reason, pod.waiting.message) if pod.waiting else ("", "")
    subject = f"Pod {pod.name}" + (f" and {len(pods) - 1} more" if len(pods) > 1 else "")
    if reason in _PULLING:
        secrets = next((quote(block.message) for block in troubles if "PullSecret" in block.reason), "")
        advice = _first(_PULLS, f"{reason} {said}", _PULLS_OTHERWISE).format(where=where)
        return Block(reason, f"{subject} cannot get its image: {_said(said, reason)}. {_opened(secrets)}{advice}.")
    if reason == "CreateContainerConfigError":
        return Block(reason, f"{subject} cannot start: {_said(said, reason)}. {_missing(said, where)}.")
    if reason == "CrashLoopBackOff":
        codes = ", ".join(str(stop.exit_code) for stop in pod.stops) or "not known"
        advice = f"`kubectl logs {pod.name}` says why"
        return Block(reason, f"{subject} ends again and again as soon as it starts, exit code {codes}. {advice}.")
    advice = "Ask the admin: the image or the node does not let the container run"
    return Block(reason, f"{subject} cannot start: {_said(said, reason)}. {advice}.")


def _trouble(block: Block, where: str) -> Block:
    """Words of an event, or of a refusal to create something."""
    said = quote(block.message)
    if block.reason == "FailedScheduling":
        return _unplaced("The job's pods find", block.message)
    if refusal := _refusal(block):
        word, advice = refusal
        return Block(word, f"The cluster refuses what the job needs in {where}: {said}. {advice}.")
    if block.reason == "FailedMount":
        return Block(block.reason, f"A volume cannot be mounted: {said}. {_missing(block.message, where)}.")
    if "PullSecret" in block.reason:
        return Block("ImagePullBackOff", f"{said}. The runtime's images.pullSecrets must exist in {where}.")
    advice = f"`kubectl describe` of the job's pods in {where} says more; ask the admin if it lasts"
    return Block(block.reason, f"The job's pods do not get on: {_said(said, block.reason)}. {advice}.")


def _refusal(block: Block) -> tuple[str, str] | None:
    """Word and advice, where these are the API server's words on something that it does not let be made."""
    found = ((word, advice) for pattern, word, advice in _REFUSALS if re.search(pattern, block.message))
    return next(found, None)


def _unplaced(subject: str, words: str) -> Block:
    said = quote(re.split(r"\s*(?:preemption|no new claims to deallocate)[,:]", words)[0])
    advice = _first(_PLACING, words, "Ask the admin which nodes the runtime's pods may use")
    return Block("Unschedulable", f"{subject} no node: {said or 'the scheduler does not say why'}. {advice}.")


def _missing(said: str, where: str) -> str:
    """What to do about a volume or a variable that has no source."""
    for pattern, advice in _MISSING:
        if match := re.search(pattern, said):
            return advice.format(name=quote(match[1].rstrip(":,"), 253), where=where)
    return "Ask the admin whether the runtime's storage settings fit this cluster"


def _first(table: Sequence[tuple[str, str]], said: str, otherwise: str) -> str:
    return next((advice for pattern, advice in table if re.search(pattern, said, re.IGNORECASE)), otherwise)


def _said(said: str, reason: str) -> str:
    return quote(said) or quote(reason) or "the cluster does not say why"


def _opened(text: str) -> str:
    return f"{text}. " if text else ""


def _word(reason: str) -> str:
    """A reason as Kubernetes allows it: status.reason takes no other."""
    word = re.sub(r"[^A-Za-z0-9_]", "", reason)
    return word[:1024] if word[:1].isalpha() else "Blocked"
