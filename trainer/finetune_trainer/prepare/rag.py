"""Retrieval-aware rows (RAFT, https://arxiv.org/abs/2403.10131): passages and a question become one turn of a chat.

Pure: the passages' order, and which rows lose the ones that hold the answer, follow from the seed and the row's hash.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from finetune_api.job import Rag
from finetune_trainer.prepare.rows import Row

INSTRUCTION: Final = (
    "Answer the question with the help of these passages, and cite those you use by their numbers, such as [1]."
)
BEFORE_QUESTION: Final = "\n\nQuestion: "
_CITATION: Final = re.compile(r" ?\[oracle(?: (\d+))?\]")


def as_chat(row: Row, rag: Rag, seed: int, row_hash: int) -> Row:
    """The row as a question with its passages, numbered from 1, and the answer.

    In the answer `[oracle]` and `[oracle 2]` become the numbers of those passages; an answer without any such mark gets
    the numbers of all oracles behind it. Rows that lose their oracles cite nothing.
    """
    lost = bool(row.oracles and row.distractors) and _draw(seed, row_hash, "without") < rag.without_oracle
    oracles = [] if lost else row.oracles
    documents = [*oracles, *row.distractors]
    order = sorted(range(len(documents)), key=lambda index: _draw(seed, row_hash, f"place {index}"))
    passages = [f"[{place}] {documents[index]}" for place, index in enumerate(order, 1)]
    numbers = [order.index(index) + 1 for index in range(len(oracles))]
    asked = f"{INSTRUCTION}\n\n" + "\n\n".join(passages) + BEFORE_QUESTION + row.question
    answer = rag.unanswered if lost and rag.unanswered is not None else _cited(row.answer, numbers)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Row("chat", messages=messages, weights=[1.0, 1.0])


def _cited(answer: str, numbers: list[int]) -> str:
    """The answer with citations of the passages `numbers`, those of the row's oracles in their order."""

    def number(mark: re.Match[str]) -> str:
        oracle = int(mark.group(1) or 1)
        space = " " if mark.group().startswith(" ") else ""
        return f"{space}[{numbers[oracle - 1]}]" if 0 < oracle <= len(numbers) else ""

    if _CITATION.search(answer):
        return _CITATION.sub(number, answer)
    return answer.rstrip() + "".join(f" [{n}]" for n in numbers)


def _draw(seed: int, row: int, what: str) -> float:
    """A number in [0, 1)."""
    digest = hashlib.blake2b(f"rag {seed} {row} {what}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
