"""Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While active, the first SIGINT or SIGTERM is noted and `check` raises it between steps; a second acts at once.

    Only the main thread can catch signals, and a signal that the process ignores stays ignored; elsewhere `check` does
    nothing and Python's own KeyboardInterrupt applies. The previous handlers come back at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.requested:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A data loading process inherits this handler: Ctrl-C is its parent's business, SIGTERM its order.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
