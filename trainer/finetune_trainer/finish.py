"""The end of a run: answers of both models, gates, verdict, model card, report, and the weights where they belong.

    <output>/model/ or adapter/ and merged/     the weights
    <output>/report/                            report.html, report.md, report.json, result.json

When a gate is missed the same goes to `<output>/rejected/` instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from finetune_api.errors import GateFailed
from finetune_api.result import EXPORT_FILE, Cost, ExportResult, Result
from finetune_api.run import EXPORT, METRICS_FILE, PREPARED, RESULT_FILE, RunConfig
from finetune_trainer import egress, figures, storage
from finetune_trainer.examine import Findings, examine
from finetune_trainer.manifest import REPORT_FILE, read_manifest, write_json
from finetune_trainer.model_card import model_card, public
from finetune_trainer.report import REPORT_FILES, write_report
from finetune_trainer.reporter import read_metrics
from finetune_trainer.verdict import gate_sentence, measure, verdict

_LIBRARIES: Final = ("finetune", "torch", "deepspeed", "transformers", "peft", "ray", "safetensors", "pyarrow")
_HELD: Final = ("start", "train", "evaluate", "checkpoint", "export")  # stages in which the workers are held

# The file that makes a published folder whole: who finds it finds the others.
_LAST: Final = {"model": "config.json", "merged": "config.json", "adapter": "adapter_config.json"}


@dataclass(frozen=True)
class Price:
    """What an hour of all workers together costs; `currency` is an ISO 4217 code."""

    per_hour: float
    currency: str = "USD"


def finish(
    run: RunConfig,
    *,
    seconds: Mapping[str, float],
    price: Price | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Does everything that comes after the export; safe to call again. `check_gates` says whether it was good enough.

    Args:
        seconds: wall time of this call's stages `prepare` and `train`.
        price: for the cost, if it is known.
        progress: told what is done, about once a second; what it raises ends the work.

    Raises:
        ExportError: a model does not load or answer.
        StorageError: the output cannot be written.
    """
    work = Path(run.work)
    progress("asking base and tuned model the prompts")
    started = time.monotonic()
    hour = None if price is None else price.per_hour / run.spec.workers.count / max(1, run.spec.workers.gpus_each)
    findings = examine(run, _tuned(work), lambda: progress("asking base and tuned model the prompts"), hour)
    answering = time.monotonic() - started
    result = _result(run, findings, seconds, answering, price)

    progress("writing weights and report")
    for folder in _folders(work):
        (folder / "README.md").write_text(model_card(result, folder.name), encoding="utf-8")
    write_report(result, read_metrics(work / METRICS_FILE), work)
    _publish(run, result)
    write_json(work / RESULT_FILE, result.model_dump(mode="json"))
    return result


def check_gates(result: Result) -> None:
    """Ends a run that was not good enough.

    Raises:
        GateFailed: a gate was missed.
    """
    missed = [gate_sentence(gate) for gate in result.gates if not gate.passed]
    if missed:
        raise GateFailed(
            "; ".join(missed),
            where="spec.evaluation.gates",
            hint=f"the weights and the report are kept aside in {result.output}",
        )


def _result(
    run: RunConfig, findings: Findings, seconds: Mapping[str, float], answering: float, price: Price | None
) -> Result:
    work = Path(run.work)
    events = read_metrics(work / METRICS_FILE)
    export = ExportResult.model_validate_json((work / EXPORT / EXPORT_FILE).read_bytes())
    evaluation = figures.evaluation_result(events)
    prompts = findings.prompts
    gates = measure(run.spec.evaluation.gates, evaluation, prompts, findings.refusals)
    stages = {**figures.stages(events, seconds, export.seconds), "answers": answering}
    hours = sum(stages[name] for name in _HELD) / 3600
    rejected = any(not gate.passed for gate in gates)
    output = run.spec.output.uri.rstrip("/") + ("/rejected" if rejected else "")
    return Result(
        name=run.name,
        uid=run.uid,
        finished=time.time(),
        model=public(run.spec.model.source),
        verdict=verdict(
            evaluation,
            prompts,
            gates,
            findings.refusals,
            findings.middles,
            findings.retrieval,
            findings.comparison,
            findings.forgetting,
        ),
        evaluation=evaluation,
        training=figures.training_result(events),
        prompts=prompts,
        answered_by=f"{_tuned(work).name}, {export.dtype}",
        gates=gates,
        refusals=findings.refusals,
        middles=findings.middles,
        retrieval=findings.retrieval,
        comparison=findings.comparison,
        forgetting=findings.forgetting,
        egress=egress.asked(events),
        export=export,
        output=public(output),
        stages=stages,
        cost=None
        if price is None
        else Cost(amount=price.per_hour * hours, currency=price.currency, price_per_hour=price.per_hour, hours=hours),
        data=json.loads((work / PREPARED / REPORT_FILE).read_bytes()),
        manifest=read_manifest(work / PREPARED).model_dump(mode="json"),
        settings=run.spec.model_dump(mode="json"),
        environment=_environment(),
    )


def _publish(run: RunConfig, result: Result) -> None:
    """The weights' folders one by one, then the report: nothing else in the output folder is touched."""
    work = Path(run.work)
    output = storage.resolve(run.spec.output.uri, run.base_dir, where="spec.output.uri")
    if any(not gate.passed for gate in result.gates):
        output = output.inside("rejected")
    for folder in _folders(work):
        storage.publish(folder, output.inside(folder.name), last=_LAST[folder.name])
    with tempfile.TemporaryDirectory() as scratch:
        for name in REPORT_FILES:
            shutil.copyfile(work / name, Path(scratch, name))
        write_json(Path(scratch, RESULT_FILE), result.model_dump(mode="json"))
        storage.publish(Path(scratch), output.inside("report"), last=RESULT_FILE)


def _folders(work: Path) -> list[Path]:
    return [work / EXPORT / name for name in _LAST if (work / EXPORT / name).is_dir()]


def _tuned(work: Path) -> Path:
    """The folder that answers: the one that needs no other, where there is one."""
    return next(work / EXPORT / n for n in ("model", "merged", "adapter") if (work / EXPORT / n).is_dir())


def _environment() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a worker without Ray is one that can train
            versions[library] = version(library)
    return {**versions, "platform": f"{platform.system()} {platform.machine()}", "cpus": str(os.cpu_count())}
