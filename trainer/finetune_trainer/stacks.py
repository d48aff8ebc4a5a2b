"""Stacks of Python threads as data and as text: files, lines and functions, never values or source lines."""

from __future__ import annotations

import sys
import threading
from itertools import islice
from pathlib import PurePath
from types import FrameType
from typing import Final

Frame = tuple[str, int, str]  # file, line, function
Stack = tuple[Frame, ...]  # the innermost frame last

_DEEPEST: Final = 100
_MOST_CHARACTERS: Final = 64 << 10
_OURS: Final = "finetune_trainer"
_COLLECTIVES: Final = ("torch/distributed/", "deepspeed/comm/")
_NEAR: Final = 8  # frames from the innermost in which a collective is looked for


def stack_of(thread: int) -> Stack:
    """The stack of the thread with this identifier; empty when it has ended."""
    return _frames(sys._current_frames().get(thread))


def all_threads() -> str:
    """The stacks of all threads of this process, for a log."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    texts = [
        "\n".join([f"  thread {names.get(ident, ident)}:", *(f"    {place(frame)}" for frame in _frames(innermost))])
        for ident, innermost in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(texts)[:_MOST_CHARACTERS]


def in_collective(stack: Stack) -> bool:
    """Whether it waits for other workers."""
    return any(part in file for file, _, _ in stack[-_NEAR:] for part in _COLLECTIVES)


def blocked_at(stack: Stack) -> str:
    """The innermost frame, and the innermost ones of ours below it, for a sentence."""
    ours = [frame for frame in stack if _OURS in frame[0]][-2:]
    shown = [stack[-1], *reversed([frame for frame in ours if frame != stack[-1]])] if stack else []
    return " < ".join(place(frame) for frame in shown)


def place(frame: Frame) -> str:
    """A frame as `folder/file.py:12 function`."""
    file, line, function = frame
    return f"{'/'.join(PurePath(file).parts[-2:])}:{line} {function}"


def _frames(innermost: FrameType | None) -> Stack:
    def walk() -> list[Frame]:
        frame, found = innermost, []
        while frame is not None:
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return found

    return tuple(reversed(list(islice(walk(), _DEEPEST))))
