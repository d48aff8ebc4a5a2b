"""Turns a file of code into the texts that a model learns: cut to length first, then with some middles taken out.

A text that is cut after its middle was moved would have a question without its answer, so the cut comes first, at a
line's end where there is one nearby.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from finetune_api.errors import ModelError
from finetune_api.job import Fim
from finetune_trainer.prepare.fim import find_file_separator, find_tokens, transform
from finetune_trainer.prepare.render import Rendered, Span
from finetune_trainer.prepare.rows import Row
from finetune_trainer.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that a text may get: three around its parts, its begin and its end, and two at each cut through a token.
_ADDED: Final = 9


@dataclass(frozen=True)
class Pieces:
    """What became of a file: its texts, whether it was cut into several, and tokens that were left out at its end."""

    rendered: list[Rendered]
    split: bool
    lost: int


class CodeRenderer:
    """Renders rows of code for one tokenizer.

    Raises:
        ModelError: middles are asked for and the tokenizer has no tokens for them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fim: Fim, seed: int, limit: int, overlong: str) -> None:
        self._tokenizer = tokenizer
        self._fim, self._seed, self._limit, self._overlong = fim, seed, limit, overlong
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._tokens = find_tokens(known)
        self._separator = find_file_separator(known)
        own = [*vars(self._tokens).values()] if self._tokens else []
        self._control = (*special_tokens(tokenizer).values(), *own, *filter(None, [self._separator]))
        if self._tokens is None and fim.rate > 0:
            raise ModelError(
                "the tokenizer has no tokens for fill in the middle",
                where=str(tokenizer.name_or_path),
                hint="use a base model for code, or set data.fim.rate to 0 to learn files as plain text",
            )

    def holds_control_token(self, text: str) -> bool:
        """Whether a token that steers the model stands in the text, as in a tokenizer's own code."""
        return any(token in text for token in self._control)

    def pieces(self, row: Row, row_hash: int) -> Pieces:
        """Texts and learned spans of one row; those with a middle behind them end with the end-of-text token."""
        header = f"{self._separator}{row.path}\n" if self._separator and row.path else ""
        texts, lost = self._cut(row.text, header)
        rendered = []
        for number, text in enumerate(texts):
            parts = [(text, True)]
            if self._tokens is not None:
                parts = transform(text, self._tokens, self._fim, self._seed, row_hash, number)
            whole, spans = header, list[Span]()
            for part, learned in parts:
                if learned:
                    spans.append((len(whole), len(whole) + len(part), 1.0))
                whole += part
            ends = len(parts) > 1 or (number == len(texts) - 1 and not lost)
            rendered.append(Rendered(whole, spans, framed=True, ends=ends))
        return Pieces(rendered, len(texts) > 1, lost)

    def _cut(self, text: str, header: str) -> tuple[list[str], int]:
        """The text in pieces that fit, and how many tokens are left out behind them."""
        encode = self._tokenizer.backend_tokenizer.encode
        room = self._limit - _ADDED - len(encode(header, add_special_tokens=False).ids)
        room = max(room, self._limit // 2)
        if self._overlong not in ("split", "truncate") or len(text.encode()) <= room:
            return [text], 0
        starts = [start for start, _ in encode(text, add_special_tokens=False).offsets]
        texts, token, begin = [], 0, 0
        while len(starts) - token > room:
            end = starts[token + room]
            line = text.rfind("\n", begin + (end - begin) * 3 // 4, end) + 1
            end = line or end
            texts.append(text[begin:end])
            token, begin = bisect.bisect_left(starts, end), end
            if self._overlong == "truncate":
                return texts, len(starts) - token
        return [*texts, text[begin:]], 0
