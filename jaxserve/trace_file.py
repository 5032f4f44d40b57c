"""A trace as a file that Perfetto and chrome://tracing open: the JSON object form of the Trace Event Format."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxserve.trace import DEVICES, ENGINE_TRACK, HOST, REQUESTS, TOKENIZER_TRACK, Span, StepCost

FORMAT = 1
"""Of ``otherData``: goes up when what is there changes its meaning."""
GROUPS = {HOST: "host", DEVICES: "devices", REQUESTS: "requests"}
END = b"\n]}\n"
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class TraceFile:
    """Is whole after every ``write``: the next one overwrites its end."""

    def __init__(
        self,
        path: Path,
        num_replicas: int,
        num_stages: int,
        gpu: str | None,
        is_simulated: bool,
        costs: Mapping[str, StepCost],
    ) -> None:
        """``costs``: of each program, on ``gpu``, which is not there if ``is_simulated``. OSError if the file cannot be
        written."""
        self._origin = time.perf_counter()
        self._file = path.open("wb")
        weakref.finalize(self, self._file.close)
        other = {
            "format": FORMAT,
            "stages": num_stages,
            "gpu": gpu,
            "simulated": is_simulated,
            "programs": {name: asdict(cost) for name, cost in costs.items()},
        }
        tracks, self._host_tracks = {(HOST, ENGINE_TRACK): "engine"}, {ENGINE_TRACK}
        for replica in range(num_replicas):
            for stage in range(num_stages):
                tracks[DEVICES, 1 + replica * num_stages + stage] = f"replica {replica}, stage {stage}"
        lines = [_metadata(group, 0, "process_name", name) for group, name in GROUPS.items()]
        lines += [_metadata(*at, "thread_name", name) for at, name in tracks.items()]
        head = f'{{"displayTimeUnit":"ms","otherData":{_dumps(other)},"traceEvents":[\n' + ",\n".join(lines)
        self._at = 0
        self._append(head)

    def write(self, spans: Sequence[Span]) -> None:
        lines, ends = [], list[str]()  # the end of the request whose phases are being written
        for span in spans:
            if span.group == HOST and span.track not in self._host_tracks:
                self._host_tracks.add(span.track)
                lines.append(_metadata(HOST, span.track, "thread_name", f"tokenizer {span.track - TOKENIZER_TRACK}"))
            if span.group != REQUESTS:
                lines.append(self._line(span))
                continue
            begin, end = self._pair(span)
            if span.name == "request":
                lines += [*ends, begin]
                ends = [end]
            else:
                lines += [begin, end]
        lines += ends
        if lines:
            self._append(",\n" + ",\n".join(lines))

    def close(self) -> None:
        self._file.close()

    def _append(self, text: str) -> None:
        self._file.seek(self._at)
        self._file.write(text.encode())
        self._at = self._file.tell()
        self._file.write(END)
        self._file.flush()

    def _line(self, span: Span) -> str:
        begin, duration = self._times(span)
        at = f'"pid":{span.group},"tid":{span.track},"ts":{begin / 1e3},"dur":{duration / 1e3}'
        return f'{{"ph":"X","name":{_dumps(span.name)},{at},"args":{_dumps(span.args) if span.args else "{}"}}}'

    def _pair(self, span: Span) -> tuple[str, str]:
        """Asynchronous events: requests overlap, and each gets rows of its own. A viewer matches ends by the order in
        the file where times are equal, so that a request's end follows those of its phases."""
        begin, duration = self._times(span)
        same = f'"name":{_dumps(span.name)},"pid":{span.group},"tid":0,"cat":"request","id":{span.track}'
        args = f'"args":{_dumps(span.args) if span.args else "{}"}'
        return f'{{"ph":"b",{same},"ts":{begin / 1e3},{args}}}', f'{{"ph":"e",{same},"ts":{(begin + duration) / 1e3}}}'

    def _times(self, span: Span) -> tuple[int, int]:
        """Beginning and duration in whole nanoseconds, so that neighbours meet."""
        begin = int((span.start - self._origin) * 1e9)
        return begin, int((span.end - self._origin) * 1e9) - begin


def _metadata(group: int, track: int, kind: str, name: str) -> str:
    event: dict[str, Any] = {"ph": "M", "pid": group, "tid": track, "name": kind, "ts": 0, "args": {"name": name}}
    return _dumps(event)
