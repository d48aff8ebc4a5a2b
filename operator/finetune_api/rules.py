"""What a rule over several fields is: CEL for the API server, and the same in Python for `finetune validate`.

Both are evaluated on the object with its defaults filled in, so only optional fields without a default need `has()`.
The Python twin is never called when a field that it reads is itself wrong: that error is shown already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]
Value = Any  # a value of a JSON document


@dataclass(frozen=True)
class Rule:
    """A rule about the value at `at`.

    Attributes:
        at: Dotted path of the value that `cel` calls `self`; `[]` stands for each item of a list.
        reads: Dotted paths below it that the rule looks at. The error is shown on the first; empty: on the value.
        cel: Expression that is true when the rule holds.
        message: What is wrong.
        do: What to do about it.
        holds: The same as `cel`, on the value with defaults.
        cluster_only: `finetune run` can do without it; offline it is a note.
    """

    at: str
    reads: tuple[str, ...]
    cel: str
    message: str
    do: str
    holds: Callable[[Value], bool]
    cluster_only: bool = False

    def validation(self) -> dict[str, str]:
        """The rule as an entry of `x-kubernetes-validations`."""
        entry = {"rule": self.cel, "message": f"{self.message}; {self.do}"}
        if self.reads:
            entry["fieldPath"] = "." + self.reads[0]
        return entry


@dataclass(frozen=True)
class Broken:
    """A rule that does not hold, and the path of the field it is shown on."""

    rule: Rule
    path: Path


def broken_rules(rules: Sequence[Rule], value: Value, wrong: Sequence[Path] = ()) -> list[Broken]:
    """The rules that do not hold for an object.

    Args:
        value: the whole object, with defaults filled in.
        wrong: paths of fields that are wrong by themselves; rules that read them are left out.
    """
    return [
        Broken(rule, (*path, *(rule.reads[0].split(".") if rule.reads else ())))
        for rule in rules
        for path, scope in values_at(value, rule.at)
        if not any(_overlap((*path, *read.split(".")), bad) for read in rule.reads or ("",) for bad in wrong)
        and not rule.holds(scope)
    ]


def values_at(value: Value, dotted: str) -> Iterator[tuple[Path, Value]]:
    """Every value that a dotted path with `[]` means, with its own path; none where the object lacks it."""
    return _below(value, dotted.split("."), ())


def _below(value: Value, parts: Sequence[str], path: Path) -> Iterator[tuple[Path, Value]]:
    if not parts:
        yield path, value
        return
    key = parts[0].removesuffix("[]")
    if not isinstance(value, Mapping) or key not in value:
        return
    below = value[key]
    if not parts[0].endswith("[]"):
        yield from _below(below, parts[1:], (*path, key))
    elif isinstance(below, list):
        for index, item in enumerate(below):
            yield from _below(item, parts[1:], (*path, key, index))


def _overlap(read: Path, wrong: Path) -> bool:
    """Whether one path lies on the way to, or below, the other."""
    read = tuple(part for part in read if part != "")
    return all(a == b for a, b in zip(read, wrong, strict=False))
