"""Which addresses a job may name: for its model, its rows and its output. See `rules.Rule`."""

from __future__ import annotations

import re
from typing import Final

from finetune_api.rules import Rule

# The expressions are the same text in RE2 and in Python.

_SCHEME: Final = r"^[A-Za-z][A-Za-z0-9+.-]*:"
SCHEMES: Final = r"^(s3|gs|abfs|abfss)://[^/]+|^file:///"
MODEL_SCHEMES: Final = (
    r"^(s3|gs|abfs|abfss)://[^/]+|^file:///|^pvc://[a-z0-9][-a-z0-9.]*(/|$)"
    r"|^hf://[A-Za-z0-9][-A-Za-z0-9_.]*/[A-Za-z0-9][-A-Za-z0-9_.]*(@[-A-Za-z0-9_./]+)?$"
)
_CREDENTIALS: Final = r"://[^@]*:[^@]*@|^(s3|gs)://[^/]*@"
_UPWARDS: Final = r"(^|/|%2[fF])(\.|%2[eE])(\.|%2[eE])(/|%2[fF]|$)"


def _cel_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def address_rules(at: str, schemes: str, examples: str) -> tuple[Rule, ...]:
    """The rules of one address field; `schemes` is the expression that its scheme must match."""
    return (
        Rule(
            at,
            (),
            f"!self.matches({_cel_text(_SCHEME)}) || self.matches({_cel_text(schemes)})",
            "this is not an address that can be read",
            f"write {examples}, or a path relative to the job file",
            lambda uri: not re.search(_SCHEME, uri) or re.search(schemes, uri) is not None,
        ),
        Rule(
            at,
            (),
            f"!self.matches({_cel_text(_CREDENTIALS)})",
            "a user and password stand in the address, where everyone can read them",
            "remove them and give them in the environment or in the runtime's secret",
            lambda uri: re.search(_CREDENTIALS, uri) is None,
        ),
        Rule(
            at,
            (),
            "!self.contains('://') || !(self.contains('?') || self.contains('#'))",
            "an address must not have options (? or #)",
            "set endpoint, region and credentials in the environment or in the runtime",
            lambda uri: "://" not in uri or not ("?" in uri or "#" in uri),
        ),
        Rule(
            at,
            (),
            f"!self.matches({_cel_text(_UPWARDS)})",
            "a path must not go upwards with `..`",
            "write the whole address, or move the files below the job file's folder",
            lambda uri: re.search(_UPWARDS, uri) is None,
        ),
        Rule(
            at,
            (),
            "self.contains('://')",
            "a path on your machine is not visible in a cluster",
            f"write {examples}",
            lambda uri: "://" in uri,
            cluster_only=True,
        ),
    )
