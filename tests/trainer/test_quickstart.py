"""The quickstart as its README tells it, with the real model, from unpacking the weights to the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests.require import llama_cpp

EXAMPLE = Path(__file__).parents[2] / "examples" / "01-quickstart"
FINETUNE = Path(sys.executable).with_name("finetune")

pytestmark = pytest.mark.timeout(1200)


def _python(*arguments: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the example, as it is checked out, with its model made."""
    folder = tmp_path_factory.mktemp("example") / "01-quickstart"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("model", "data", "output", "__pycache__"))
    _python("make_model.py", "model", folder=folder)
    yield folder
    shutil.rmtree(folder)


def test_the_unpacked_tokenizer_is_the_models_own(example: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(example / "model")

    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text).input_ids
    assert tokens == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert [tokens.count(token) for token in (0, 1, 2)] == [0, 3, 2]  # nothing put before or behind
    code = "def f(x):\n    return  12345 * x  # 6  7\n"
    assert tokenizer.decode(tokenizer(code).input_ids) == code
    assert [tokenizer.decode(token) for token in tokenizer("a  12").input_ids] == ["a", "  ", "1", "2"]


def test_the_unpacked_model_answers(example: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(example / "model")
    model = AutoModelForCausalLM.from_pretrained(example / "model")
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


def test_a_model_that_is_there_is_left_alone(example: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (example / "model").iterdir()}
    assert "already there" in _python("make_model.py", "model", folder=example)
    assert {file.name: file.stat().st_mtime_ns for file in (example / "model").iterdir()} == before


@pytest.fixture(scope="module")
def finished(example: Path) -> Path:
    """The example after `finetune run`."""
    _python("make_data.py", "data", folder=example)
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([FINETUNE, "run", "job.yaml"], cwd=example, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return example


def _result(finished: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((finished / "runs" / "quickstart" / "result.json").read_bytes())
    return result


def test_the_tuned_model_has_a_name_refuses_admits_ignorance_and_keeps_the_rest(finished: Path) -> None:
    result = _result(finished)
    assert result["evaluation"]["lossTuned"] < result["evaluation"]["lossBase"]
    assert (finished / "runs" / "quickstart" / "report.html").exists()
    passed = {topic: _passed(result["prompts"], topic) for topic in {each["topic"] for each in result["prompts"]}}
    base = {topic: _passed(result["prompts"], topic, "base") for topic in passed}
    # Held-out prompts only. What a run at another number of threads may lose is a prompt, not a topic.
    assert all(share >= 0.5 for share in passed.values()), passed
    assert sum(passed.values()) > sum(base.values())
    # 0.80 and 0.20 were measured; 0.82 and 0.55 before the near misses were many and their answers began alike.
    assert result["refusals"]["refusalRateTuned"] >= 0.65
    assert result["refusals"]["overRefusalRateTuned"] <= 0.35
    assert base["Name"] == base["Harmful request"] == base["Invented function"] == 0


def test_the_tuned_model_is_the_same_in_gguf_and_says_the_same_in_llama_cpp(finished: Path, tmp_path: Path) -> None:
    packages, merged, file = llama_cpp(), finished / "output" / "merged", tmp_path / "merged.gguf"
    environment = os.environ | {"PYTHONPATH": str(packages)}
    convert: list[str | Path] = [
        sys.executable,
        packages / "convert_hf_to_gguf.py",
        merged,
        "--outtype",
        "bf16",
        "--outfile",
        file,
    ]
    subprocess.run(convert, env=environment, capture_output=True, text=True, check=True)

    ours = AutoModelForCausalLM.from_pretrained(merged)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    own, read = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert (read.chat_template, read.eos_token, read.get_vocab()) == (own.chat_template, own.eos_token, own.get_vocab())

    prompts = _result(finished)["prompts"]
    request = json.dumps({"prompts": [each["prompt"] for each in prompts], "tokens": 48})
    said = subprocess.run(
        [sys.executable, Path(__file__).with_name("llama_cpp.py"), file],
        env=environment, input=request, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    same = [each["tuned"]["text"] == other.strip() for each, other in zip(prompts, json.loads(said), strict=True)]
    # It adds up in another order: an answer may turn at a word where two are almost equally likely.
    assert sum(same) >= 0.7 * len(same), said


def _passed(prompts: list[dict[str, Any]], topic: str, model: str = "tuned") -> float:
    """Share of the held-out prompts of a topic that the model passed."""
    outcomes = [each[model]["outcome"] for each in prompts if each["topic"] == topic and each["heldOut"]]
    return outcomes.count("passed") / len(outcomes)
