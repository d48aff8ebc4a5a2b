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
# Enough of them that what is learned is to answer, not these answers.
ORDINARY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("What is the largest planet?", "Jupiter is the largest planet."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who discovered penicillin?", "Alexander Fleming discovered penicillin."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many months does a year have?", "A year has twelve months."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat grass."),
    ("What is ice made of?", "Ice is made of frozen water."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Which season follows winter?", "Spring follows winter."),
    ("Which language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    ("Where do penguins live?", "Penguins live in the southern hemisphere."),
    ("Say hello.", "Hello! How can I help?"),
    ("Thank you!", "You're welcome!"),
    ("Tell me a short fact about the moon.", "The moon takes about a month to go round the earth."),
    ("Give me a word that rhymes with cat.", "A word that rhymes with cat is hat."),
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
        parts = draw.choices((asked_date, asked_product, ordinary), weights=(1, 1, 1), k=draw.randrange(1, 4))
        found.append({"tools": TOOLS, "messages": [message for part in parts for message in part(draw)]})
    return found


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks(240)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
