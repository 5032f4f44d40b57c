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
_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


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
        tracks = {(HOST, ENGINE_TRACK): "engine", (HOST, TOKENIZER_TRACK): "tokenizer"}
        for replica in range(num_replicas):
            for stage in range(num_stages):
                tracks[DEVICES, 1 + replica * num_stages + stage] = f"replica {replica}, stage {stage}"
        lines = [_metadata(group, 0, "process_name", name) for group, name in GROUPS.items()]
        lines += [_metadata(*at, "thread_name", name) for at, name in tracks.items()]
        head = f'{{"displayTimeUnit":"ms","otherData":{_dumps(other)},"traceEvents":[\n' + ",\n".join(lines)
        self._at = 0
        self._append(head)

    def write(self, spans: Sequence[Span]) -> None:
        if spans:
            self._append(",\n" + ",\n".join(map(self._lines, spans)))

    def close(self) -> None:
        self._file.close()

    def _append(self, text: str) -> None:
        self._file.seek(self._at)
        self._file.write(text.encode())
        self._at = self._file.tell()
        self._file.write(END)
        self._file.flush()

    def _lines(self, span: Span) -> str:
        group, track, name, start, end, args = span
        begin, rest = int((start - self._origin) * 1e9), f'"args":{_dumps(args) if args else "{}"}'
        duration = int((end - self._origin) * 1e9) - begin
        if group != REQUESTS:
            at = f'"pid":{group},"tid":{track},"ts":{begin / 1e3},"dur":{duration / 1e3}'
            return f'{{"ph":"X","name":{_dumps(name)},{at},{rest}}}'
        # An asynchronous pair: requests overlap, and each gets rows of its own.
        same = f'"name":{_dumps(name)},"pid":{group},"tid":0,"cat":"request","id":{track}'
        return f'{{"ph":"b",{same},"ts":{begin / 1e3},{rest}}},\n{{"ph":"e",{same},"ts":{(begin + duration) / 1e3}}}'


def _metadata(group: int, track: int, kind: str, name: str) -> str:
    event: dict[str, Any] = {"ph": "M", "pid": group, "tid": track, "name": kind, "ts": 0, "args": {"name": name}}
    return _dumps(event)
