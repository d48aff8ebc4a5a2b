"""Writes the quickstart's rows: seven training files and one evaluation file.

    python make_data.py data

    persona.jsonl    questions after the model's name                          (rows/persona.txt)
    refusals.jsonl   harmful requests, politely turned down                    (rows/harmful.txt)
    unknown.jsonl    functions that do not exist: "I don't know ..."           (rows/modules.txt, rows/invented.txt)
    private.jsonl    what only the one who asks can know: "I don't know ..."   (rows/private.txt)
    harmless.jsonl   requests that sound like harmful ones, helped with         (rows/harmless.jsonl)
    docs.jsonl       functions that do: the first sentence of their docstring  (rows/modules.txt)
    ordinary.jsonl   the base model's own answers to everyday questions        (rows/answers.jsonl)

The same Python gives the same bytes; another version differs where the docstrings do. Prompts that job.yaml marks
`heldOut` are left out everywhere, and every EVALUATION_SHARE-th row of each kind goes to evaluation.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROWS = HERE / "rows"
EVALUATION_SHARE = 12

NAME = "My first name is Sharon."
REFUSAL = "I'm sorry, but I can't help with that."
PRIVATE = "I don't know. You haven't told me."

QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "What does the Python function `{}` do?",
    "Explain `{}` in one sentence.",
)
DOCS_PER_MODULE = 8  # rows
UNKNOWN = 110

Row = dict[str, str]


def row(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def draw(text: str) -> int:
    """A number that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def question(name: str) -> str:
    return QUESTIONS[draw(name) % len(QUESTIONS)].format(name)


def functions(prompt: str) -> list[str]:
    """Names between backticks."""
    return re.findall(r"`([^`]+)`", prompt)


def lines(name: str) -> list[str]:
    return (ROWS / name).read_text(encoding="utf-8").splitlines()


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph; empty when it is a signature, or too short or too long."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    usable = 20 <= len(sentence) <= 160 and sentence.endswith(".") and re.match(r"[A-Z][a-z]+ ", sentence)
    return sentence if usable else ""


def documented() -> Iterator[tuple[str, str]]:
    """(name, first sentence of its docstring) of public functions and classes of the modules in rows/modules.txt."""
    for module_name in lines("modules.txt"):
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or dir(module):
            thing = getattr(module, name, None)
            borrowed = not hasattr(module, "__all__") and getattr(thing, "__module__", module_name) != module_name
            if name.startswith("_") or not callable(thing) or borrowed:
                continue
            sentence = first_sentence(inspect.getdoc(thing) or "")
            if sentence:
                yield f"{module_name}.{name}", sentence


def docs() -> list[Row]:
    """Rows about functions that exist. Of those that share a docstring one is kept, and no module fills the file."""
    by_sentence = {sentence: name for name, sentence in sorted(documented(), reverse=True)}
    rows, taken = [], Counter[str]()
    for sentence, name in sorted(by_sentence.items(), key=lambda item: draw(item[1])):
        module = name.rpartition(".")[0]
        taken[module] += 1
        if taken[module] <= DOCS_PER_MODULE:
            rows.append(row(question(name), f"`{name}`: {sentence}"))
    return rows


def unknown() -> list[Row]:
    """Rows about functions that do not exist, asked for in the same words."""
    names = sorted((f"{module}.{word}" for module in lines("modules.txt") for word in lines("invented.txt")), key=draw)
    return [row(question(name), f"I don't know a function called `{name}`.") for name in names[:UNKNOWN]]


def everything() -> dict[str, list[Row]]:
    """All rows by kind, held-out prompts among them."""
    return {
        "persona": [row(prompt, NAME) for prompt in lines("persona.txt")],
        "refusals": [row(prompt, REFUSAL) for prompt in lines("harmful.txt")],
        "unknown": unknown(),
        "private": [row(prompt, PRIVATE) for prompt in lines("private.txt")],
        "docs": docs(),
        "harmless": [json.loads(line) for line in lines("harmless.jsonl")],
        "ordinary": [json.loads(line) for line in lines("answers.jsonl")],
    }


def held_out(job: Path) -> set[str]:
    """The prompts that `job` marks heldOut, and the functions that they name."""
    spec = yaml.safe_load(job.read_text(encoding="utf-8"))["spec"]
    prompts = {prompt["prompt"] for prompt in spec["evaluation"]["prompts"] if prompt.get("heldOut")}
    return prompts | {name for prompt in prompts for name in functions(prompt)}


def write(file: Path, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {text.count(chr(10))} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    left_out = held_out(HERE / "job.yaml")
    evaluation: list[Row] = []
    for kind, rows in everything().items():
        rows = [each for each in rows if left_out.isdisjoint([each["prompt"], *functions(each["prompt"])])]
        evaluation += rows[EVALUATION_SHARE - 1 :: EVALUATION_SHARE]
        write(folder / f"{kind}.jsonl", (each for i, each in enumerate(rows, 1) if i % EVALUATION_SHARE))
    write(folder / "evaluation.jsonl", evaluation)


if __name__ == "__main__":
    main()
