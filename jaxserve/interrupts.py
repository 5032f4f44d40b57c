"""Ctrl-C at a moment at which it does no harm."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Uninterrupted:
    """A block at whose end a SIGINT arrives that comes inside of it; the second one arrives at once.

    For calls that are given arrays away: they have returned new ones before anybody can lose them. In other threads
    than the main one, and where the process handles SIGINT without Python, it does nothing.
    """

    def __enter__(self) -> None:
        self._handler: Any = None
        self._waiting: tuple[int, FrameType | None] | None = None
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._handler = signal.signal(signal.SIGINT, self._wait)

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._waiting is not None:
            self._handler(*self._waiting)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None:
            self._handler(number, frame)
        self._waiting = number, frame
