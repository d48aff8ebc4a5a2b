"""Job files: reading them, checking everything in them, and saying all that is wrong at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.checks import Checked, Problem, check_document
from finetune_api.documents import MAX_BYTES, Mark, read_documents
from finetune_api.errors import SpecError, join
from finetune_api.job import FinetuneJob

STDIN = "-"


@dataclass
class FileReport:
    """What stands in one file, and what is wrong with the file as a whole."""

    file: str
    documents: list[Checked] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def errors(self) -> list[SpecError]:
        """Every problem of the file and its documents, in the order of lines."""
        found = [*self.problems, *(problem for document in self.documents for problem in document.problems)]
        return [
            SpecError(problem.what, where=f"{self.file}:{problem.mark.line}", hint=problem.hint)
            for problem in sorted(found, key=lambda problem: problem.place)
        ]

    def as_json(self) -> dict[str, object]:
        """The report for programs; `localOnly` are fields that `finetune run` reads and a cluster cannot."""
        return {
            "file": self.file,
            "valid": not self.errors(),
            "problems": [problem.as_json() for problem in self.problems],
            "documents": [
                {
                    "kind": document.kind,
                    "name": document.name,
                    "valid": not document.problems,
                    "localOnly": document.local_only,
                    "problems": [problem.as_json() for problem in document.problems],
                }
                for document in self.documents
            ],
        }


def check_file(file: str | Path) -> FileReport:
    """Checks every document of a file; `-` is standard input. Never raises for what the file holds."""
    name = "<stdin>" if str(file) == STDIN else str(file)
    try:
        text = _read(file)
    except SpecError as error:
        return FileReport(name, problems=[Problem(Mark(1, 1), "", error.what, hint=error.hint)])
    return check_text(text, name)


def check_text(text: str, name: str) -> FileReport:
    """Checks every document of a YAML text; `name` stands in messages."""
    documents, stopped = read_documents(text)
    report = FileReport(name, [check_document(document) for document in documents])
    if stopped:
        report.problems.append(Problem(stopped.mark, "", stopped.message, hint=stopped.hint))
    elif not documents:
        report.problems.append(Problem(Mark(1, 1), "", "the file is empty", hint="write a FinetuneJob into it"))
    report.problems += _repeated(report.documents)
    return report


def load_job(file: str | Path) -> FinetuneJob:
    """The one FinetuneJob of a file.

    Raises:
        SpecError: the file, or anything in it, is wrong (all of it is said), or it does not hold exactly one job.
    """
    report = check_file(file)
    if errors := report.errors():
        raise errors[0] if len(errors) == 1 else SpecError(join(errors))
    jobs = [document.resource for document in report.documents if isinstance(document.resource, FinetuneJob)]
    if len(jobs) != 1:
        raise SpecError(
            f"one FinetuneJob is needed, and there are {len(jobs)}",
            where=report.file,
            hint="put each job into a file of its own",
        )
    return jobs[0]


def _read(file: str | Path) -> str:
    try:
        if str(file) == STDIN:
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the name is not a path"
        raise SpecError(f"cannot be read: {reason}", hint="check the path and its permissions") from error
    if len(data) > MAX_BYTES:
        raise SpecError(
            f"is larger than {MAX_BYTES >> 20} MiB",
            hint="a job file names its rows by their address; is this a data file?",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"is not UTF-8: byte {error.start} on line {line}", hint="save it as UTF-8") from error


def _repeated(documents: Iterable[Checked]) -> list[Problem]:
    seen: set[tuple[str, str, str]] = set()
    problems = []
    for document in documents:
        key = (document.kind, document.namespace, document.name)
        if document.name and key in seen:
            message = f"a second {document.kind} is called {document.name}"
            problems.append(Problem(document.mark, "metadata.name", message, hint="give each its own name"))
        seen.add(key)
    return problems
