"""Makes PyTorch's CUDA build load on a machine that has neither a GPU nor the CUDA libraries.

PyPI has one torch wheel for Linux, the CUDA build. It is linked against cuBLAS, cuDNN, NCCL and others, so that they
must be there for ``import torch``, 2 GB of them, though nothing calls them without a GPU. This writes small
libraries of the same names beside torch's own, where the loader looks last: each symbol that torch takes from them
ends the process with a sentence that says what to do. A real library that is installed later is found first.

    python cuda_stubs.py VENV/lib/python3.11/site-packages/torch/lib

Needs a C compiler and binutils. Prints the names it wrote.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

MESSAGE = (
    "finetune: this environment was set up without the CUDA libraries and something called them ({soname}); "
    "run `make setup ACCELERATOR=cuda`\\n"
)
SOURCE = """\
#include <stdlib.h>
#include <unistd.h>
static const char message[] = "{message}";
static void unavailable(void) {{ if (write(2, message, sizeof message - 1)) {{}} abort(); }}
{aliases}
"""


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    libraries = sorted(folder.glob("lib*.so*"))
    missing = missing_libraries(folder, libraries)
    symbols = undefined_symbols(libraries, missing)
    for soname in missing:
        build(folder / soname, symbols[soname])
    print(" ".join(missing))


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout


def missing_libraries(folder: Path, libraries: list[Path]) -> list[str]:
    """Names of the NVIDIA libraries that torch is linked against and that no folder of its run path has."""
    dynamic = run("readelf", "-dW", *libraries)
    needed = set(re.findall(r"NEEDED.*\[((?:libcu|libnccl|libnv)[^]]*)\]", dynamic))
    places = {entry for path in re.findall(r"R(?:UN)?PATH.*\[([^]]*)\]", dynamic) for entry in path.split(":")}
    # Not the folder itself: what is there of these is an earlier stub.
    folders = {Path(place.replace("$ORIGIN", str(folder))).resolve() for place in places} - {folder}
    # libcuda comes with the driver, libcusolver is needed by a part that torch loads on first use of a GPU.
    needed -= {name for name in needed if name.startswith(("libcuda.", "libcusolver."))}
    return sorted(name for name in needed if not any((place / name).exists() for place in folders))


def undefined_symbols(libraries: list[Path], sonames: list[str]) -> dict[str, set[str]]:
    """What torch takes from each library, as ``name`` or ``name@VERSION``.

    An ELF file does not say which library a symbol is to come from; here the names do: ``cublasLtMatmul`` is of
    libcublasLt, the longest of the library names that it starts with.
    """
    stems = {re.sub(r"^lib|_host|\.so.*$", "", soname).lower(): soname for soname in sonames}
    found: dict[str, set[str]] = defaultdict(set)
    for line in run("nm", "-D", "--undefined-only", "--with-symbol-versions", *libraries).splitlines():
        symbol = line.split()[-1] if line.strip() else ""
        stem = max((stem for stem in stems if symbol.lower().startswith(stem)), key=len, default=None)
        if stem:
            found[stems[stem]].add(symbol.replace("@@", "@"))
    return found


def build(target: Path, symbols: set[str]) -> None:
    """Compiles one library that has the given symbols under their versions."""
    versions: dict[str, list[str]] = defaultdict(list)
    for symbol in sorted(symbols):
        name, _, version = symbol.partition("@")
        versions[version].append(name)
    names = [name for group in versions.values() for name in group]
    with tempfile.TemporaryDirectory() as scratch:
        source, script, made = Path(scratch, "stub.c"), Path(scratch, "stub.map"), Path(scratch, "stub.so")
        aliases = "\n".join(f'void {name}(void) __attribute__((alias("unavailable")));' for name in names)
        source.write_text(SOURCE.format(message=MESSAGE.format(soname=target.name), aliases=aliases))
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{target.name}", "-o", str(made), str(source)]
        if set(versions) - {""}:
            script.write_text("".join(f"{v} {{ global: {'; '.join(n)}; }};\n" for v, n in versions.items() if v))
            command.append(f"-Wl,--version-script,{script}")
        run(*command)
        # A new file in torch's folder: its own files may be hard links into uv's cache and are never written to.
        target.unlink(missing_ok=True)
        target.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
