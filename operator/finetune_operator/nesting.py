"""JSON of strangers. Anyone who may make a job may nest values 10,000 deep; no reader here breaks on that.

The API server stores such an object, and every list that it is part of brings it to the operator. What lies deeper than
MAX_DEPTH is cut off, so that the rest of the list can be read; the job itself is then refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

MAX_DEPTH: Final = 128  # twice what a job may have, so that a cut one is still too deep

_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def loads(data: bytes) -> Any:
    """The value of a JSON text; what is nested too deep for the parser becomes null.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(data)
    except RecursionError:
        return json.loads(b"".join(_shallow(data)))


def prune(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The value without what is nested deeper than `depth`; it is changed in place."""
    level = [value]
    for below in range(depth):
        deeper = []
        for each in level:
            for key in each if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ():
                if isinstance(each[key], dict | list):
                    if below == depth - 1:
                        each[key] = None
                    else:
                        deeper.append(each[key])
        level = deeper
    return value


def depth_of(value: Any) -> int:
    """How many mappings and lists lie in one another."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [below for each in level for below in (each.values() if isinstance(each, dict) else each)]
    return depth


def _shallow(data: bytes) -> Iterator[bytes]:
    """The text with `null` for every list and mapping that lies too deep."""
    depth = start = 0
    for token in _TOKEN.finditer(data):
        sign = token[0]
        if sign in (b"{", b"["):
            depth += 1
            if depth == MAX_DEPTH + 1:
                yield data[start : token.start()] + b"null"
        elif sign in (b"}", b"]"):
            depth -= 1
            if depth == MAX_DEPTH:
                start = token.end()
    yield data[start:]
