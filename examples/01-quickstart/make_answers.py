"""Writes rows/answers.jsonl: the base model's own answers to rows/ordinary.txt.

    python make_answers.py model

Rows that say what the model says anyway keep the tuned model from giving its name, or a refusal, to every question.
The file is committed, so that the quickstart need not wait for it. Decoding is greedy and the first sentence is kept;
prompts that the model answers wrongly were taken out of the list by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = Path(__file__).parent / "rows"
MAX_TOKENS = 48
BATCH = 16


def first_sentence(text: str) -> str:
    """The first sentence of `text`; empty when it does not end."""
    found = re.match(r".+?[.!?](?=\s|$)", text)
    return found.group() if found else ""


def answers(folder: Path, prompts: list[str]) -> list[str]:
    """The first sentence of the greedy answer to each prompt, asked through the model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [first_sentence(text.strip()) for text in texts]
        print(f"{len(found)}/{len(prompts)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that make_model.py wrote")
    folder: Path = parser.parse_args().model
    prompts = (ROWS / "ordinary.txt").read_text().splitlines()
    with (ROWS / "answers.jsonl").open("w") as file:
        for prompt, answer in zip(prompts, answers(folder, prompts), strict=True):
            if answer:
                file.write(json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
