"""scripts/cuda_stubs.py: stand-ins for the CUDA libraries, built with the machine's compiler and really loaded."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import require

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA build of torch is Linux's")


@pytest.fixture(scope="module")
def stubs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_stubs", ROOT / "scripts" / "cuda_stubs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def consumer(tmp_path: Path) -> Path:
    """A library that calls two CUDA libraries, as torch does; they are there while it is linked and gone after."""
    require.program("cc")
    real = tmp_path / "real"
    real.mkdir()
    script = real / "versions.map"
    script.write_text("libcublas.so.13 { global: *; };")
    versioned = f"-Wl,--version-script,{script}"
    for name, symbol, options in (("cublas", "cublasCreate", [versioned]), ("cublasLt", "cublasLtMatmul", [])):
        source, soname = real / f"{name}.c", f"lib{name}.so.13"
        source.write_text(f"int {symbol}(void) {{ return 0; }}")
        compile_library(source, real / soname, f"-Wl,-soname,{soname}", *options)
        (real / f"lib{name}.so").symlink_to(soname)
    source = tmp_path / "consumer.c"
    source.write_text(
        "int cublasCreate(void); int cublasLtMatmul(void);\n"
        "int safe(void) { return 7; }\nint unsafe(void) { return cublasCreate() + cublasLtMatmul(); }\n"
    )
    folder = tmp_path / "lib"
    folder.mkdir()
    target = folder / "libconsumer.so"
    compile_library(source, target, "-Wl,-rpath,$ORIGIN", "-Wl,-z,now", f"-L{real}", "-lcublas", "-lcublasLt")
    shutil.rmtree(real)
    return target


def compile_library(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source, *options], check=True)


def make(consumer: Path) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "cuda_stubs.py"), str(consumer.parent)]
    made: str = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return made.strip()


def call(consumer: Path, function: str) -> subprocess.CompletedProcess[str]:
    """Calls a function of the library in a process of its own: this one may have the real CUDA libraries loaded."""
    script = f"import ctypes; print(ctypes.CDLL({str(consumer)!r}).{function}())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_a_library_loads_without_the_ones_it_is_linked_against(consumer: Path) -> None:
    assert "libcublas.so.13: cannot open shared object file" in call(consumer, "safe").stderr
    assert make(consumer) == "libcublas.so.13 libcublasLt.so.13"
    assert call(consumer, "safe").stdout == "7\n"


def test_a_call_ends_the_process_and_says_what_to_do(consumer: Path) -> None:
    make(consumer)
    done = call(consumer, "unsafe")
    assert done.returncode != 0
    assert "make setup ACCELERATOR=cuda" in done.stderr


def test_making_them_again_gives_the_same(consumer: Path) -> None:
    assert make(consumer) == make(consumer) != ""


def test_a_symbol_belongs_to_the_library_with_the_longest_matching_name(stubs: ModuleType, consumer: Path) -> None:
    found = stubs.undefined_symbols([consumer], ["libcublas.so.13", "libcublasLt.so.13"])
    assert found == {"libcublas.so.13": {"cublasCreate@libcublas.so.13"}, "libcublasLt.so.13": {"cublasLtMatmul"}}
