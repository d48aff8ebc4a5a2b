"""Greedy answers of llama.cpp, by the package xllamacpp: {"prompts": [...], "tokens": n} comes in, a list goes out.

A program, not a module: its packages stand outside the environment, in the folder that tests.require.llama_cpp names.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main(file: str) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)
    request = json.load(sys.stdin)
    answers = []
    for prompt in request["prompts"]:
        chat = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": request["tokens"],
            "temperature": 0,
            "cache_prompt": False,
        }
        answers.append(server.handle_chat_completions(chat)["choices"][0]["message"]["content"])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
