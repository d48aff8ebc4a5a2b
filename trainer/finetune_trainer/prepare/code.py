"""What counts as code: languages by the ending of a file's name, the licence a file names, and the filter over both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from finetune_api.job import CodeFilter

_ENDINGS: Final = {
    "ada": "adb ads", "bash": "sh bash", "c": "c h",
    "clojure": "clj cljs", "cmake": "cmake", "cpp": "cpp cc cxx hpp hh",
    "csharp": "cs", "css": "css scss less", "cuda": "cu cuh", "dart": "dart", "elixir": "ex exs", "elm": "elm",
    "erlang": "erl hrl", "fortran": "f90 f95 f03", "fsharp": "fs", "go": "go", "graphql": "graphql", "groovy": "groovy",
    "haskell": "hs", "html": "html htm", "java": "java", "javascript": "js jsx mjs cjs", "julia": "jl",
    "kotlin": "kt kts", "lua": "lua", "markdown": "md rst", "nix": "nix", "objective-c": "m mm", "ocaml": "ml mli",
    "perl": "pl pm", "php": "php", "powershell": "ps1", "protobuf": "proto", "python": "py pyi", "r": "r", "ruby": "rb",
    "rust": "rs", "scala": "scala", "sql": "sql", "svelte": "svelte", "swift": "swift", "terraform": "tf hcl",
    "typescript": "ts tsx", "verilog": "v sv", "vhdl": "vhd vhdl", "vue": "vue", "yaml": "yaml yml", "zig": "zig",
}  # fmt: skip
_LANGUAGES: Final = {ending: language for language, endings in _ENDINGS.items() for ending in endings.split()}
_NAMED: Final = {"Dockerfile": "dockerfile", "Makefile": "makefile", "BUILD": "starlark", "CMakeLists.txt": "cmake"}
_SPDX: Final = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]*[A-Za-z0-9.+)])")
_HEAD: Final = 4096  # characters in which a file names its licence


def language_of(path: str) -> str | None:
    """The language of a file by its name; None for what is not known to be code."""
    name = PurePosixPath(path)
    return _NAMED.get(name.name) or _LANGUAGES.get(name.suffix.lower().removeprefix("."))


def license_of(text: str) -> str | None:
    """The SPDX identifier in a file's first lines (https://spdx.org/licenses), if it names one."""
    found = _SPDX.search(text[:_HEAD])
    return found.group(1) if found else None


def wanted_language(language: str | None, asked: CodeFilter) -> bool:
    """Whether files in this language are read."""
    return _among(language, asked.languages)


def wanted_license(named: str | None, asked: CodeFilter) -> bool:
    """Whether files under this licence are read."""
    return _among(named, asked.licenses)


def _among(name: str | None, asked: Sequence[str]) -> bool:
    return not asked or (name is not None and name.casefold() in {one.casefold() for one in asked})
