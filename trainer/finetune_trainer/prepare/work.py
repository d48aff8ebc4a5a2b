"""What a worker does to one chunk of rows: parse, check, render, tokenise, cut to length, hash. It keeps no state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from finetune_api.job import CodeFilter, ColumnField, Fim, Rag
from finetune_trainer.manifest import TokenizerFacts
from finetune_trainer.prepare.code import language_of, license_of, wanted_language, wanted_license
from finetune_trainer.prepare.cut import Counts, Cuts, Cutter, Documents
from finetune_trainer.prepare.deduplicate import PERMUTATIONS, signatures
from finetune_trainer.prepare.fields import BadRow, Problem
from finetune_trainer.prepare.pieces import CodeRenderer
from finetune_trainer.prepare.rag import as_chat
from finetune_trainer.prepare.read import Chunk
from finetune_trainer.prepare.render import Rendered, Renderer
from finetune_trainer.prepare.rows import FIELDS, Row, RowFormat, check_row, detect, normalised
from finetune_trainer.tokenizer import load_tokenizer, tokenizer_facts

MOST_PROBLEMS: Final = 20


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know of the job. Equal for all workers."""

    model: Path
    loss: str
    sequence_length: int
    overlong: str
    near_duplicates: bool
    fim: Fim
    rag: Rag
    seed: int
    held_out: Mapping[str, int]  # normalised prompt: its number in spec.evaluation.prompts
    pairs: bool  # the objective is dpo


@dataclass(frozen=True)
class Task:
    """One chunk and how to read it. `format` is None when the file's first row did not show one."""

    file: int
    chunk: Chunk
    format: RowFormat | None
    given: bool  # the user named the format, so rows may have other formats' fields too
    columns: Mapping[ColumnField, str]
    train: bool
    code: CodeFilter
    built_in: bool  # our own rows, which give way to the job's


@dataclass
class LeftOut(Counts):
    """Rows that are none for this job: code that is not asked for, or cannot be learned from."""

    language: int = 0
    license: int = 0
    control_token: int = 0  # they hold a token that steers the model
    unreadable: int = 0  # files that are empty, or no UTF-8 text


@dataclass(frozen=True)
class Result:
    """A chunk's R rows and the D documents made of them; arrays run in the order of the file."""

    file: int
    format: str
    read: int
    problems: list[tuple[int, Problem]]
    numbers: npt.NDArray[np.int64]  # [R] line or row number in the file
    lengths: npt.NDArray[np.int64]  # [R] tokens, before anything is cut
    hashes: npt.NDArray[np.uint64]  # [R] of the rendered text, or of what it is made of
    minima: npt.NDArray[np.uint32]  # [R, PERMUTATIONS], or [0, …] when near duplicates are not asked for
    rows: npt.NDArray[np.int64]  # [D] the document's row, counted in this chunk
    sizes: npt.NDArray[np.int32]  # [D] tokens
    ids: npt.NDArray[np.int32]  # all documents' tokens
    weights: npt.NDArray[np.float16]  # and their loss weights
    cuts: Cuts
    left_out: LeftOut
    repositories: npt.NDArray[np.uint64]  # [R] hash of the code's repository, 0 where there is none
    paths: list[bytes]  # [R] of code inside of its repository


@dataclass
class _Batch:
    """A chunk's rows on their way to a Result."""

    numbers: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    rendered: list[Rendered] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # the row of each text
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    cuts: Cuts = field(default_factory=Cuts)

    def problem(self, task: Task, number: int, bad: BadRow) -> None:
        """Notes what is wrong with a row; a built-in one just gives way."""
        if not task.built_in:
            self.problems.append((number, bad.problem))


class Worker:
    """Turns chunks into results with one tokenizer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tokenizer = load_tokenizer(settings.model)
        self._renderer = Renderer(self._tokenizer, settings.loss)
        self._code_renderer: CodeRenderer | None = None

    def facts(self) -> TokenizerFacts:
        """The tokenizer, for the manifest."""
        return tokenizer_facts(self._tokenizer, self._settings.model)

    def __call__(self, task: Task) -> Result:
        batch = self._read(task)
        rows = batch.rows
        tokens = self._renderer.tokens(batch.rendered)
        documents = Documents()
        cutter = Cutter(self._settings.sequence_length, self._settings.overlong, documents, batch.cuts)
        for index, texts in groupby(zip(batch.owners, tokens, strict=True), key=lambda each: each[0]):
            try:
                if self._settings.pairs:
                    (_, chosen), (_, rejected) = texts
                    cutter.add_pair(index, chosen, rejected)
                else:
                    for _, text in texts:
                        cutter.add(index, *text)
            except BadRow as bad:
                batch.problem(task, batch.numbers[index], bad)
        lengths = np.bincount(batch.owners, [len(ids) for ids, _ in tokens], len(rows)) if rows else np.zeros(0)
        near = self._settings.near_duplicates and rows
        return Result(
            file=task.file,
            format=rows[0].format if rows else "",
            read=task.chunk.read,
            problems=sorted(batch.problems, key=lambda item: item[0])[:MOST_PROBLEMS],
            numbers=np.array(batch.numbers, dtype=np.int64),
            lengths=lengths.astype(np.int64),
            hashes=np.array(batch.hashes, dtype=np.uint64),
            minima=signatures(["\n".join(r.said()) for r in rows]) if near else np.zeros((0, PERMUTATIONS), np.uint32),
            rows=np.array(documents.rows, dtype=np.int64),
            sizes=np.array([len(ids) for ids in documents.ids], dtype=np.int32),
            ids=np.concatenate([np.zeros(0, np.int32), *documents.ids]),
            weights=np.concatenate([np.zeros(0, np.float16), *documents.weights]),
            cuts=batch.cuts,
            left_out=batch.left_out,
            repositories=np.array([_hash(r.repository) | 1 if r.repository else 0 for r in rows], dtype=np.uint64),
            paths=[r.path.encode() for r in rows],
        )

    def _read(self, task: Task) -> _Batch:
        """The chunk's rows that are wanted, and their texts."""
        batch = _Batch()
        batch.left_out.unreadable = task.chunk.unreadable
        for number, fields in _fields(task.chunk, batch.problems):
            try:
                row = _row(task, fields)
                if not self._wanted(row, task, batch.left_out):
                    continue
                self._check_objective(row)
                if task.train:
                    self._check_held_out(row)
                identity, texts = self._render(row, batch.cuts)
            except BadRow as bad:
                batch.problem(task, number, bad)
            else:
                batch.owners += [len(batch.rows)] * len(texts)
                batch.rendered += texts
                batch.numbers.append(number)
                batch.rows.append(row)
                batch.hashes.append(identity)
            if len(batch.problems) >= MOST_PROBLEMS:
                break
        return batch

    def _render(self, row: Row, cuts: Cuts) -> tuple[int, list[Rendered]]:
        """The row's hash, by which it is known and drawn, and its texts: one, or several of code."""
        settings, identity = self._settings, row.identity()
        if row.format == "preference":
            halves = [self._renderer.render(half) for half in row.halves]
            return _hash("\0".join(half.text for half in halves)), halves
        if identity is None:
            rendered = self._renderer.render(row)
            return _hash(rendered.text), [rendered]
        row_hash = _hash(identity)
        if row.format == "rag":
            return row_hash, [self._renderer.render(as_chat(row, settings.rag, settings.seed, row_hash))]
        pieces = self._code().pieces(row, row_hash)
        cuts.split_rows += pieces.split
        cuts.truncated_rows += pieces.lost > 0
        cuts.truncated_tokens += pieces.lost
        return row_hash, pieces.rendered

    def _code(self) -> CodeRenderer:
        if self._code_renderer is None:
            settings = self._settings
            self._renderer.needs_end()
            self._code_renderer = CodeRenderer(
                self._tokenizer, settings.fim, settings.seed, settings.sequence_length, settings.overlong
            )
        return self._code_renderer

    def _wanted(self, row: Row, task: Task, left_out: LeftOut) -> bool:
        """Whether a row of code is one of those asked for; if not, it is counted."""
        if row.format != "code":
            return True
        if not wanted_language(row.language or language_of(row.path), task.code):
            left_out.language += 1
        elif not wanted_license(row.license or license_of(row.text), task.code):
            left_out.license += 1
        elif self._code().holds_control_token(row.text + row.path):
            left_out.control_token += 1
        else:
            return True
        return False

    def _check_objective(self, row: Row) -> None:
        if self._settings.pairs and row.format != "preference":
            raise BadRow(
                "",
                f"the row is {row.format}, and objective dpo learns from preferences",
                "give every row chosen and rejected, or set method.objective to sft",
            )
        if row.format == "preference" and not self._settings.pairs:
            raise BadRow(
                ", ".join(FIELDS["preference"]), "the row is a preference", "set method.objective to dpo for such rows"
            )

    def _check_held_out(self, row: Row) -> None:
        for asked in row.asked() if self._settings.held_out else []:
            prompt = self._settings.held_out.get(normalised(asked))
            if prompt is not None:
                raise BadRow(
                    "",
                    f"the row asks what spec.evaluation.prompts[{prompt}] holds out of training",
                    "remove the row, or set the prompt's heldOut to false",
                )


def first_format(chunk: Chunk, columns: Mapping[ColumnField, str]) -> RowFormat | None:
    """The format of the chunk's first row; None when it shows none, which a worker will report."""
    first = next(_fields(chunk, []), None)
    try:
        return None if first is None else detect(_renamed(first[1], columns))
    except BadRow:
        return None


def _row(task: Task, fields: dict[str, Any]) -> Row:
    fields = _renamed(fields, task.columns)
    if task.given and task.format is not None:
        return check_row(fields, task.format)
    found = detect(fields)
    if task.format not in (None, found):
        raise BadRow(
            ", ".join(name for name in FIELDS[found] if name in fields),
            f"the row is {found} and the file began with {task.format}",
            "put rows of each format into a file of their own",
        )
    return check_row(fields, found)


def _fields(chunk: Chunk, problems: list[tuple[int, Problem]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's number and fields; rows that are none are added to `problems`."""
    rows = chunk.rows
    if isinstance(rows, list):
        yield from rows
    elif isinstance(rows, bytes):
        for number, line in enumerate(rows.split(b"\n"), chunk.first):
            if line.strip():
                try:
                    yield number, _parse(line)
                except BadRow as bad:
                    problems.append((number, bad.problem))
    else:
        yield from enumerate(rows.to_pylist(), chunk.first)


def _parse(line: bytes) -> dict[str, Any]:
    """The fields of one line of JSON."""
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRow("", f"byte {error.start + 1} of the line is not UTF-8", "convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        if b"\0" in line:
            raise BadRow("", "the line holds zero bytes, as UTF-16 does", "convert the file to UTF-8") from None
        raise BadRow(
            "", f"the line is not JSON: {error.msg} at character {error.pos + 1}", "write one JSON object a line"
        ) from None
    except RecursionError:
        raise BadRow("", "the row is nested too deeply", "write it as messages, or as plain text fields") from None
    if not isinstance(value, dict):
        hint = "a JSON array becomes lines with: jq -c '.[]'" if isinstance(value, list) else "write one object a line"
        raise BadRow("", "the line is JSON but not an object", hint)
    return value


def _no_constant(name: str) -> NoReturn:
    raise BadRow("", f"{name} is not a JSON value", "write null, or leave the field out")


def _renamed(fields: dict[str, Any], columns: Mapping[ColumnField, str]) -> dict[str, Any]:
    """The fields under our names."""
    if not columns:
        return fields
    for name, column in columns.items():
        if column not in fields:
            raise BadRow(column, "the field is missing", f"`columns` names it as the file's {name!r}")
    rest = {name: value for name, value in fields.items() if name not in columns.values()}
    return rest | {name: fields[column] for name, column in columns.items()}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
