"""The base model and the bounded field types that every part of the contract is made of."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from finetune_api import patterns

GROUP: Final = "finetune.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

_UNIT_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


class Model(BaseModel):
    """Base of the contract: unknown keys are errors, names are camelCase on the wire, values are frozen.

    Types are strict, since the API server's are: "3" is not a number, true is not 1.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # a command builds the models that it uses
    )


def parse_duration(text: str) -> int:
    """Seconds in a duration such as ``90s``, ``30m``, ``1h30m`` or ``2d``.

    Raises:
        ValueError: the text is empty or not a duration.
    """
    if not text or not re.fullmatch(patterns.DURATION, text):
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 30m, 1h30m or 2d")
    return sum(int(n) * _UNIT_SECONDS[unit] for n, unit in re.findall(r"([0-9]+)([dhms])", text))


def format_duration(seconds: float) -> str:
    """Whole seconds the way `parse_duration` reads them, with at most two units: ``1h30m``, ``45s``, ``2d``."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in _UNIT_SECONDS.items():
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size}{unit}")
            left %= size
    return "".join(parts) or "0s"


def _checked_duration(text: str) -> str:
    parse_duration(text)
    return text


Duration = Annotated[
    str, StringConstraints(min_length=2, max_length=32, pattern=patterns.DURATION), AfterValidator(_checked_duration)
]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=patterns.PRINTABLE)]
Sentence = Annotated[str, StringConstraints(max_length=1024)]
LongText = Annotated[str, StringConstraints(min_length=1, max_length=8192)]
ResourceName = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=patterns.NAME)]
Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=patterns.ADDRESS)]
# A folder's address leaves room for what is put below it.
FolderUri = Annotated[str, StringConstraints(min_length=1, max_length=768, pattern=patterns.ADDRESS)]
Sha256 = Annotated[str, StringConstraints(min_length=64, max_length=64, pattern=patterns.SHA256)]
Timestamp = Annotated[
    str, StringConstraints(max_length=40, pattern=patterns.TIMESTAMP), Field(json_schema_extra={"format": "date-time"})
]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveCount = Annotated[int, Field(ge=1, le=1_000_000_000)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Money = Annotated[float, Field(ge=0, le=1e12)]
Measure = Annotated[float, Field(ge=-1e12, le=1e12)]
