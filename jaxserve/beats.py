"""Signs of life of the processes of one engine, and what they say about who died, hangs or went astray. No jax here.

Every process publishes a ``Beat`` about once a second and looks at those of the others. Python's own thread does it, so
a process that is stopped, or whose interpreter is stuck, falls silent; one whose main thread is stuck goes on beating,
and is known by falling behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

SILENCE_SECONDS = 12.0
"""A process that shows no sign of life for so long is taken for dead."""
HANG_SECONDS = 15.0
"""So long may a process be behind the others and not move."""
STEP_SECONDS = 120.0
"""So long may a step take that all processes wait for."""

Outcome = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class Verdict:
    """Why the job has to end."""

    reason: str
    outcome: Outcome = "failed"


@dataclass(frozen=True)
class Beat:
    """What a process says of itself."""

    count: int = 0
    """Of beats."""
    entries: int = 0
    """Of the journal: sent by the leader, or followed."""
    pieces: int = 0
    """In how many pieces."""
    step: int = 0
    digest: str = ""
    """Of the last decision."""
    working: bool = False
    """Whether the leader's host is in the middle of a step."""
    computing: bool = False
    """Whether the devices have something to do."""
    ended: str | None = None
    """Why the process ended or is about to."""
    outcome: Outcome = "done"
    """How, if it ended; anything but "done" ends the others."""

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if v != getattr(Beat, k)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Beat:
        return cls(**json.loads(text))


class Observer:
    """Looks at everybody's beats and says what is wrong, as soon as it is sure."""

    def __init__(self, names: Sequence[str], now: float) -> None:
        """``names`` of the processes, the leader's first; ``now``: any clock, the same for all calls."""
        self.names = names
        self._beats = [Beat()] * len(names)
        self._heard, self._looked = [now] * len(names), now
        self._since: dict[str, tuple[float, object]] = {}

    def observe(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        """Take note of what there is; why the job has to end, or None."""
        if now - self._looked > SILENCE_SECONDS / 2:  # it was this process that slept
            self._heard, self._since = [now] * len(self.names), {}
        self._looked = now
        for i, beat in beats.items():
            if beat.count != self._beats[i].count:
                self._heard[i] = now
            self._beats[i] = beat
        for beat in self._beats:
            if beat.ended is not None and beat.outcome != "done":
                return Verdict(beat.ended, beat.outcome)
        reason = self._silent(now) or self._astray() or self._behind(now) or self._stuck(now)
        return None if reason is None else Verdict(reason)

    @property
    def pieces(self) -> int:
        """How many pieces of the journal every follower is done with."""
        return min(beat.pieces for beat in self._beats[1:])

    def others_gone(self, now: float) -> bool:
        """Whether every follower has said that it ends, or can say nothing any more."""
        heard = zip(self._beats[1:], self._heard[1:], strict=True)
        return all(beat.ended is not None or now - at > SILENCE_SECONDS for beat, at in heard)

    def _silent(self, now: float) -> str | None:
        for i, beat in enumerate(self._beats):
            if beat.ended is None and now - self._heard[i] > SILENCE_SECONDS:
                return (
                    f"{self.names[i]} has shown no sign of life for {now - self._heard[i]:.0f} s: it died, was "
                    "stopped, or cannot be reached"
                )
        return None

    def _astray(self) -> str | None:
        leader = self._beats[0]
        for name, beat in zip(self.names, self._beats, strict=True):
            if beat.step == leader.step and beat.digest != leader.digest:
                return astray(name, self.names[0], leader.step, beat.digest, leader.digest)
        return None

    def _behind(self, now: float) -> str | None:
        """A follower that does not do what the leader wrote down."""
        leader = self._beats[0]
        for i, beat in enumerate(self._beats[1:], 1):
            is_behind = beat.ended is None and beat.entries < leader.entries
            seconds = self._lasting(f"behind {i}", is_behind, beat.entries, now)
            if seconds > HANG_SECONDS:
                return (
                    f"{self.names[i]} hangs: for {seconds:.0f} s it has been at step {beat.step}, "
                    f"{self.names[0]} is at step {leader.step}"
                )
        return None

    def _stuck(self, now: float) -> str | None:
        """A leader that does not go on although its devices are done, or a step that nobody gets done."""
        leader = self._beats[0]
        seconds = self._lasting("host", leader.working and not leader.computing, leader.entries, now)
        if seconds > HANG_SECONDS:
            return f"{self.names[0]} hangs: for {seconds:.0f} s it has been at step {leader.step}, with idle devices"
        seconds = self._lasting("device", leader.working and leader.computing, leader.entries, now)
        if seconds > STEP_SECONDS:
            return f"step {leader.step} has not ended for {seconds:.0f} s: a device or a link does not answer"
        return None

    def _lasting(self, what: str, holds: bool, at: object, now: float) -> float:
        """For how many seconds something has held, at the same place."""
        since = self._since.get(what)
        if not holds:
            self._since.pop(what, None)
            return 0.0
        if since is None or since[1] != at:
            self._since[what] = since = (now, at)
        return now - since[0]


def astray(name: str, leader: str, step: int, digest: str, expected: str) -> str:
    """What is said of a process that decided otherwise."""
    return f"{name} decided otherwise than {leader} in step {step}: digest {digest}, not {expected}"
