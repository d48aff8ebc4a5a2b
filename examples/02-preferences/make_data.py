"""Writes pairs.jsonl: the same questions answered briefly (chosen) and with a lot of words around it (rejected).

python examples/02-preferences/make_data.py examples/02-preferences/data
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

FACTS = {
    "How many days does a week have?": "A week has seven days.",
    "Which planet is the closest to the sun?": "Mercury is the closest to the sun.",
    "What does a thermometer measure?": "It measures temperature.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What do bees make?": "Bees make honey.",
    "What is the freezing point of water?": "Water freezes at 0 °C.",
    "Which season follows winter?": "Spring follows winter.",
    "What is the largest ocean?": "The Pacific is the largest ocean.",
    "How many minutes does an hour have?": "An hour has 60 minutes.",
    "What is bread made from?": "Bread is made from flour, water and yeast.",
    "Which animal is known for its long neck?": "The giraffe is.",
    "What colour do blue and yellow make?": "They make green.",
    "How many sides does a triangle have?": "A triangle has three sides.",
    "What do plants need to grow?": "They need light, water and soil.",
    "Which month comes after May?": "June comes after May.",
    "What is a group of wolves called?": "It is called a pack.",
    "How many wheels does a bicycle have?": "A bicycle has two wheels.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "Which organ pumps blood?": "The heart pumps blood.",
    "What do cows drink?": "Cows drink water.",
}
AROUND = (
    "That's a great question! {} There are many interesting things to say about this, and I hope this helps.",
    "Sure, I'd be happy to help you with that! {} Let me know if you have any other questions at all.",
    "Well, as we all know, this is something that many people wonder about. {} Isn't that fascinating?",
)


def pairs() -> list[dict[str, str]]:
    """Each question with each of the wordy forms of its answer."""
    return [
        {"prompt": question, "chosen": answer, "rejected": words.format(answer)}
        for (question, answer), words in itertools.product(FACTS.items(), AROUND)
    ]


def main(folder: Path) -> None:
    """Writes the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
