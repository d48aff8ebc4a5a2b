"""Writes chats.jsonl: talks of several turns in which the assistant calls a tool, reads its result and answers.

python examples/03-tools/make_data.py examples/03-tools/data

The results are right: the weekdays are the calendar's, the products are arithmetic's.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import sys
from pathlib import Path
from typing import Any

TOOLS = [
    {"type": "function", "function": {"name": "weekday", "description": "Weekday of a date"}},
    {"type": "function", "function": {"name": "multiply", "description": "Product of two numbers"}},
]
DATES = ("What weekday is {}?", "Which day of the week was {}?", "On what day does {} fall?", "Is {} a Sunday?")
PRODUCTS = ("What is {} times {}?", "Multiply {} by {}.", "How much is {} x {}?", "I need {} boxes of {}. How many?")
ORDINARY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Say hello.", "Hello! How can I help?"),
    ("What colour is the sky?", "The sky is blue."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
)

Message = dict[str, Any]


def call(name: str, arguments: dict[str, Any]) -> Message:
    """A call counts double: a wrong one makes what follows worthless."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}], "weight": 2}


def asked_date(draw: random.Random) -> list[Message]:
    day = dt.date(1950, 1, 1) + dt.timedelta(days=draw.randrange(36_500))
    name = day.strftime("%A")
    return [
        {"role": "user", "content": draw.choice(DATES).format(day.isoformat())},
        call("weekday", {"date": day.isoformat()}),
        {"role": "tool", "content": name},
        {"role": "assistant", "content": f"{day.isoformat()} is a {name}."},
    ]


def asked_product(draw: random.Random) -> list[Message]:
    left, right = draw.randrange(12, 999), draw.randrange(12, 999)
    return [
        {"role": "user", "content": draw.choice(PRODUCTS).format(left, right)},
        call("multiply", {"a": left, "b": right}),
        {"role": "tool", "content": str(left * right)},
        {"role": "assistant", "content": f"It is {left * right}."},
    ]


def ordinary(draw: random.Random) -> list[Message]:
    question, answer = draw.choice(ORDINARY)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talks(count: int) -> list[dict[str, Any]]:
    """Talks of one to three questions; the same at every run."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        parts = draw.choices((asked_date, asked_product, ordinary), weights=(2, 2, 1), k=draw.randrange(1, 4))
        found.append({"tools": TOOLS, "messages": [message for part in parts for message in part(draw)]})
    return found


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks(240)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
