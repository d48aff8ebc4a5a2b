"""Reading and writing words: known signs in a log, where it happened, what others said, which setting to change."""

from __future__ import annotations

import re
from typing import Final

from finetune_api.job import FinetuneJobSpec
from finetune_api.status import FailureReason, Plan
from finetune_operator.observe import Pod

SENTENCE_LIMIT: Final = 1024  # finetune_api.base.Sentence
_QUOTE_LIMIT: Final = 300
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\s]+")  # breaks a line, or drives a terminal

# Signs in a log or in an unexpected exception, each cause before what follows from it.
_SIGNS: Final[tuple[tuple[str, FailureReason], ...]] = (
    (r"(CUDA|HIP)( error:)? out of memory", "OutOfGpuMemory"),
    (r"No space left on device[^\n]*/dev/shm|/dev/shm[^\n]*No space left|bus error", "OutOfSharedMemory"),
    (r"running low on memory|cannot allocate memory|can't allocate memory|bad_alloc", "OutOfHostMemory"),
    (r"No space left on device|disk quota exceeded", "Storage"),
    (r"uncorrectable ECC|fallen off the bus|NodeDiedError|\bXid\b", "Node"),
    (r"collective operation timeout", "Hang"),
    (r"AWS Error|SlowDown|NoSuchBucket|AccessDenied", "Storage"),
    (r"\bNCCL\b|\bnccl[A-Z]\w+Error|\bgloo\b|connection (reset|closed|refused)|closed connection", "Network"),
)
SIGNIFIES: Final[dict[FailureReason, str]] = {
    "OutOfGpuMemory": "a GPU's memory is full",
    "OutOfSharedMemory": "/dev/shm is full",
    "OutOfHostMemory": "a process found no more memory",
    "Storage": "a disk or the storage failed",
    "Node": "a node or a GPU of it failed",
    "Hang": "workers waited for each other without end",
    "Network": "workers lost each other",
}


def recognise(words: str) -> FailureReason | None:
    """The class of a known sign in somebody's words; a key of SIGNIFIES."""
    return next((reason for pattern, reason in _SIGNS if re.search(pattern, words, re.IGNORECASE)), None)


def quote(text: str, limit: int = _QUOTE_LIMIT) -> str:
    """Somebody else's words as one line of at most `limit` characters, without a full stop at its end.

    What is too long loses its middle: a chain of errors names the cause last.
    """
    line = _CONTROL.sub(" ", text).strip().rstrip(".").rstrip()
    start = limit // 3
    return line if len(line) <= limit else f"{line[:start]} … {line[start + 3 - limit :]}"


def sentence(text: str) -> str:
    """`text` within the bounds of a status's message."""
    line = _CONTROL.sub(" ", text).strip()
    return line if len(line) <= SENTENCE_LIMIT else line[: SENTENCE_LIMIT - 1] + "…"


def capital(text: str) -> str:
    """`text` as the start of a sentence, unless its first word is an address or a name."""
    first, space, rest = text.partition(" ")
    return first[:1].upper() + first[1:] + space + rest if first.isalpha() and first.islower() else text


def place(pod: Pod) -> str:
    """A pod as the subject of a sentence."""
    kind = {"head": "Head pod", "worker": "Worker pod", "other": "Pod"}[pod.role]
    return f"{kind} {pod.name}" + (f" on node {pod.node}" if pod.node else "")


def eviction(pod: Pod) -> str:
    """The kubelet's words on a pod that it put out for want of memory or disk; empty when it did not."""
    why = pod.disrupted.message if pod.disrupted and pod.disrupted.reason == "TerminationByKubelet" else ""
    if pod.reason == "Evicted":
        return pod.message or why or pod.reason
    return why if "low on resource" in why else ""


def expected_memory(plan: Plan | None) -> str:
    """What the plan expected of a GPU's memory; empty when it did not say."""
    if plan is None or plan.gpu_memory_bytes is None:
        return ""
    return f"The plan expected {plan.gpu_memory_bytes / 2**30:.1f} GiB on each GPU."


def gpu_memory_advice(spec: FinetuneJobSpec) -> str:
    """Settings that save memory of a GPU and that the job does not have yet, in the order to try them."""
    options = [
        *_smaller_batches(spec),
        *([] if spec.training.activation_checkpointing else ["set training.activationCheckpointing"]),
        *([] if spec.deepspeed.zero_stage == 3 else ["set deepspeed.zeroStage to 3"]),
        *([] if spec.deepspeed.offload.optimizer == "cpu" else ["set deepspeed.offload.optimizer to cpu"]),
    ]
    return f"{_listed(options)}."


def host_memory_advice(spec: FinetuneJobSpec, stage: str) -> str:
    """Settings that give a pod more of its node's memory, or let it use less."""
    admins = "ask the admin for a runtime with more resources.memoryPerCpu"
    if stage != "train":
        return f"{capital(admins)}."
    options = [f"raise workers.cpusEach (is {spec.workers.cpus_each:g}), as memory comes with CPU cores"]
    if "cpu" in (spec.deepspeed.offload.optimizer, spec.deepspeed.offload.parameters):
        options.insert(0, "turn deepspeed.offload off")
    if spec.workers.gpus_each == 0:
        options = [*_smaller_batches(spec), *options]
    return f"{_listed([*options, admins])}."


def _smaller_batches(spec: FinetuneJobSpec) -> list[str]:
    shorter = f"lower data.sequenceLength (is {spec.data.sequence_length})"
    if spec.training.micro_batch == 1:
        return [shorter]
    return [f"lower training.microBatch (is {spec.training.micro_batch})", shorter]


def _listed(options: list[str]) -> str:
    whole = ", ".join(options[:-1]) + f", or {options[-1]}" if len(options) > 1 else options[0]
    return capital(whole)
