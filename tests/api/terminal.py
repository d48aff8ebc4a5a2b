"""A program in a terminal, as a person would run it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading


class Terminal:
    """A program in a terminal of 100 columns; `text` is what it has written so far."""

    def __init__(self, line: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._written = bytearray()
        self.program = subprocess.Popen(
            line,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            start_new_session=True,
            # Tests that run in the background ignore Ctrl-C, and a program would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def text(self) -> str:
        return self._written.decode(errors="replace")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._ours, 1 << 16)
            except OSError:  # Linux says so when the last program has left the terminal
                return
            if not part:
                return
            self._written += part
