"""Who comes when, with how many tokens: drawn from a seed, or read from a file.

A trace file has one JSON object per line: "arrival" (seconds), "prompt_tokens", "output_tokens", and if wished
"tenant", "priority", "prefix" (requests with the same one begin with the same tokens) and "prefix_tokens" (how many;
part of "prompt_tokens").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""(generator, how many) -> values"""


@dataclass(frozen=True)
class Arrival:
    """One request, ``arrival`` seconds after the start."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    prefix: str | None = None
    """Requests with the same one begin with the same tokens."""
    prefix_tokens: int = 0
    """How many; among ``prompt_tokens``."""

    def __post_init__(self) -> None:
        if not (_is_number(self.arrival) and 0 <= self.arrival < math.inf):
            raise ValueError(f"arrival={self.arrival!r}: it is a number of seconds, 0 or more")
        for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("prefix_tokens", 0), ("priority", -math.inf)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: it is a whole number" + (f" of at least {least}" * (least >= 0)))
        if not isinstance(self.tenant, str) or not isinstance(self.prefix, str | None):
            raise ValueError("tenant and prefix are texts")
        if self.prefix_tokens > self.prompt_tokens:
            raise ValueError(f"prefix_tokens={self.prefix_tokens} are more than prompt_tokens={self.prompt_tokens}")

    def tokens(self, index: int, seed: int) -> list[int]:
        """Token ids of the ``index``-th prompt."""
        rest = np.random.default_rng([seed, 0, index]).integers(1 << 30, size=self.prompt_tokens - self.shared)
        return self._prefix_ids(seed) + rest.tolist()

    @property
    def shared(self) -> int:
        return self.prefix_tokens if self.prefix is not None else 0

    def _prefix_ids(self, seed: int) -> list[int]:
        if not self.shared:
            return []
        words = list((self.prefix or "").encode())
        return np.random.default_rng([seed, 1, *words]).integers(1 << 30, size=self.shared).tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- files -------------------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> list[Arrival]:
    """In the order of arrival. Raises ValueError with the line that is wrong."""
    known, arrivals = {f.name for f in fields(Arrival)}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            unknown = sorted(set(entry) - known)
            if unknown:
                raise ValueError(f"{unknown[0]!r} is not a field of a trace; there are {', '.join(sorted(known))}")
            arrivals.append(Arrival(**entry))
        except (ValueError, TypeError) as error:
            reason = str(error).replace("Arrival.__init__() ", "")
            raise ValueError(f"{path}, line {number}: {reason}") from None
    if not arrivals:
        raise ValueError(f"{path}: there is no request in it")
    return sorted(arrivals, key=lambda a: a.arrival)


def write_trace(arrivals: list[Arrival], path: Path) -> None:
    """Fields at their defaults are left out."""
    default = Arrival(0, 1, 1)
    optional = ("tenant", "priority", "prefix", "prefix_tokens")
    with path.open("w", encoding="utf-8") as file:
        for arrival in arrivals:
            entry = asdict(arrival)
            kept = {k: v for k, v in entry.items() if k not in optional or v != getattr(default, k)}
            file.write(json.dumps(kept) + "\n")


# -- drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TraceShape:
    """What to draw. ``arrival_times`` and ``lengths`` read the texts; ValueError names the option that is wrong."""

    requests: int = 1000
    arrivals: str = "poisson:10"
    prompt_len: str = "lognormal:256,0.8"
    output_len: str = "lognormal:128,0.6"
    longest: int = 8192
    """Most tokens of a prompt, and of an output."""
    shared_prefix: str | None = None
    tenants: str | None = None
    priorities: str | None = None
    seed: int = 0

    def draw(self) -> list[Arrival]:
        """Each property is drawn from numbers of its own, so that changing one leaves the others."""
        count = self.requests
        if count < 1:
            raise ValueError(f"--requests {count}: at least 1")
        rngs = iter(np.random.default_rng(self.seed).spawn(6))
        times = arrival_times(self.arrivals)(next(rngs), count)
        prompts = _clipped(lengths(self.prompt_len, "--prompt-len")(next(rngs), count), self.longest)
        outputs = _clipped(lengths(self.output_len, "--output-len")(next(rngs), count), self.longest)
        tenants = _choose(tenant_shares(self.tenants), next(rngs), count)
        priorities = _choose(priority_shares(self.priorities), next(rngs), count)
        size, share = shared_prefix(self.shared_prefix)
        has_prefix = next(rngs).random(count) < share
        return [
            Arrival(
                arrival=float(times[i]),
                prompt_tokens=int(prompts[i]) + size * bool(has_prefix[i]),
                output_tokens=int(outputs[i]),
                tenant=tenants[i],
                priority=int(priorities[i]),
                prefix="shared" if has_prefix[i] else None,
                prefix_tokens=size * bool(has_prefix[i]),
            )
            for i in range(count)
        ]


def _clipped(values: np.ndarray, longest: int) -> np.ndarray:
    return np.clip(np.rint(values).astype(int), 1, longest)


def arrival_times(text: str) -> Draw:
    """Seconds, in order."""
    number = r"(\d+\.?\d*|\.\d+)"
    if text == "all":
        return lambda rng, n: np.zeros(n)
    if (match := re.fullmatch(f"(poisson|uniform):{number}", text)) and float(match[2]) > 0:
        rate = float(match[2])
        if match[1] == "uniform":
            return lambda rng, n: np.arange(n) / rate
        return lambda rng, n: np.cumsum(rng.exponential(1 / rate, n))
    if (match := re.fullmatch(rf"burst:(\d+)@{number}", text)) and int(match[1]) > 0:
        size, period = int(match[1]), float(match[2])
        return lambda rng, n: np.arange(n) // size * period
    raise ValueError(f"--arrivals {text}: it is poisson:RATE, uniform:RATE, burst:N@PERIOD or all, above 0")


def lengths(text: str, name: str) -> Draw:
    """Numbers of tokens, not rounded yet."""
    if (match := re.fullmatch(r"fixed:(\d+)", text)) and int(match[1]) > 0:
        return lambda rng, n: np.full(n, float(match[1]))
    if (match := re.fullmatch(r"uniform:(\d+)-(\d+)", text)) and 0 < int(match[1]) <= int(match[2]):
        low, high = int(match[1]), int(match[2])
        return lambda rng, n: rng.integers(low, high + 1, n).astype(float)
    if (match := re.fullmatch(r"lognormal:(\d+\.?\d*),(\d+\.?\d*|\.\d+)", text)) and float(match[1]) > 0:
        median, sigma = float(match[1]), float(match[2])
        return lambda rng, n: median * np.exp(sigma * rng.standard_normal(n))
    raise ValueError(f"{name} {text}: it is fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA, above 0")


def shared_prefix(text: str | None) -> tuple[int, float]:
    """(tokens, share of the requests)"""
    if text is None:
        return 0, 0.0
    match = re.fullmatch(r"(\d+):(\d+\.?\d*|\.\d+)", text)
    if match is None or float(match[2]) > 1:
        raise ValueError(f"--shared-prefix {text}: it is N:SHARE, tokens and a share from 0 to 1")
    return int(match[1]), float(match[2])


def tenant_shares(text: str | None) -> dict[str, float]:
    return {"": 1.0} if text is None else {name: share for name, (share, _) in _tenants(text).items()}


def tenant_rates(text: str | None) -> dict[str, float]:
    """Most tokens per second of those that have a limit."""
    return {} if text is None else {name: rate for name, (_, rate) in _tenants(text).items() if rate is not None}


def _tenants(text: str) -> dict[str, tuple[float, float | None]]:
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"([^=:,]+)=(\d+\.?\d*|\.\d+)(?::(\d+\.?\d*))?", part.strip())
        if match is None or float(match[2]) <= 0 or (match[3] is not None and float(match[3]) <= 0):
            raise ValueError(f"--tenants {text}: {part!r} is not NAME=SHARE or NAME=SHARE:RATE, above 0")
        found[match[1]] = float(match[2]), None if match[3] is None else float(match[3])
    return found


def priority_shares(text: str | None) -> dict[str, float]:
    if text is None:
        return {"0": 1.0}
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)=(\d+\.?\d*|\.\d+)", part.strip())
        if match is None or float(match[2]) <= 0:
            raise ValueError(f"--priorities {text}: {part!r} is not PRIORITY=SHARE, above 0")
        found[match[1]] = float(match[2])
    return found


def _choose(shares: dict[str, float], rng: np.random.Generator, count: int) -> list[str]:
    whole = sum(shares.values())
    chosen = rng.choice(len(shares), size=count, p=[share / whole for share in shares.values()])
    names = list(shares)
    return [names[i] for i in chosen]
