"""A scheduler driven by a fake model on a simulated cache, with everything recounted at every step.

The fake model's next token is a function of all tokens before it, so that what a request should say is known
beforehand. The simulated cache knows, for every slot of every block, of which sequence of tokens it is the end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate, chain, islice
from typing import Any

from jaxserve.config import SchedulerConfig
from jaxserve.kv_cache.block_pool import NULL_BLOCK
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request, Status
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Replica, Scheduled, Scheduler, SchedulerCounters, SchedulerOutput

VOCABULARY = 50
NEVER = frozenset[int]()
GARBAGE = 0
"""What is in the cache behind the end of a sequence."""

_params: dict[Any, SamplingParams] = {}


def make_config(**changes: Any) -> SchedulerConfig:
    sizes: dict[str, Any] = {
        "max_model_len": 40,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 60,
    }
    return SchedulerConfig(**sizes | changes)


def make_request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    stop: Iterable[int] = NEVER,
    *,
    arrival_time: float = 0.0,
    min_tokens: int = 0,
    **fields: Any,
) -> Request:
    key = (max_tokens, tuple(sorted(stop)), min_tokens)
    if key not in _params:
        _params[key] = SamplingParams(max_tokens=max_tokens, stop_token_ids=list(key[1]), min_tokens=min_tokens)
    metrics = RequestMetrics(arrival_time=arrival_time)
    return Request(name, list(prompt), _params[key], 0, frozenset(stop), max_tokens, metrics, **fields)


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: losing or repeating a token changes all that follow."""
    return hash(tuple(tokens)) % VOCABULARY


@dataclass
class Story:
    """What becomes of a request that is alone."""

    tokens: list[int]
    """Prompt and everything that the model would say, also behind the end."""
    length: int
    """Tokens of prompt and output until the end."""
    cells: list[int]
    """Per token, what the cache should hold for it: it depends on all tokens before it and on the extra keys."""
    names: dict[bytes, list[int]]
    """Names of all full blocks, and the cells of each."""

    @classmethod
    def of(cls, request: Request, config: SchedulerConfig) -> Story:
        tokens, start = list(request.prompt_token_ids), request.num_prompt_tokens
        longest = min(config.max_model_len, start + request.max_tokens)
        while len(tokens) < longest + 2 * config.num_scheduler_steps:
            tokens.append(next_token(tokens))
        ends = (i + 1 for i in range(start, longest) if tokens[i] in request.stop_token_ids)
        length = min((e for e in ends if e - start > request.params.min_tokens), default=longest)
        prompt_length = start if config.keys_depend_on_prompt_length else None
        keys = (request.cache_salt, request.adapter, prompt_length)
        cells = list(accumulate(tokens, lambda cell, token: hash((cell, token)), initial=hash(keys)))[1:]
        cells[length:] = [GARBAGE] * (len(cells) - length)
        names, name, size = {}, sha256(repr(keys).encode()).digest(), config.block_size
        for at in range(0, length - size + 1, size):
            words = b"".join(token.to_bytes(4, "little") for token in tokens[at : at + size])
            names[name := sha256(name + words).digest()] = cells[at : at + size]
        return cls(tokens, length, cells, names)


class Cache:
    """Device and host memory of one replica: what was written where, in the order of the steps."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        blocks = (config.blocks_of(window) for window in config.windows)
        self.groups = [[[GARBAGE] * config.block_size for _ in range(count)] for count in blocks]
        self.host: dict[int, list[list[list[int]]]] = {}

    def move(self, output: SchedulerOutput, replica: int) -> None:
        """First out, then in."""
        for move in output.swap_outs:
            if move.replica == replica:
                assert move.handle not in self.host
                self.host[move.handle] = [
                    [list(group[b]) for b in blocks] for group, blocks in zip(self.groups, move.blocks, strict=True)
                ]
        for move in output.swap_ins:
            if move.replica == replica:
                stored = self.host.pop(move.handle)
                for group, blocks, contents in zip(self.groups, move.blocks, stored, strict=True):
                    assert len(set(blocks)) == len(blocks) and NULL_BLOCK not in blocks
                    for block, content in zip(blocks, contents, strict=True):
                        group[block] = content

    def write(self, s: Scheduled, story: Story) -> None:
        size = self.config.block_size
        for group, table in zip(self.groups, s.tables, strict=True):
            for position in range(s.start, s.start + s.count):
                assert table[position // size] != NULL_BLOCK
                group[table[position // size]][position % size] = story.cells[position]

    def read(self, s: Scheduled, story: Story) -> None:
        """Everything that the row's tokens look back on is there."""
        end = min(s.start + s.count, story.length)
        for group, table, window in zip(self.groups, s.tables, self.config.windows, strict=True):
            start = 0 if window is None else max(0, s.start - window + 1)
            seen = islice(chain.from_iterable(group[block] for block in table), start, end)
            assert list(seen) == story.cells[start:end], f"{s.request.request_id} reads what is not its own"


@dataclass
class Run:
    """A scheduler that is driven step by step, at once or one step ahead of the tokens."""

    scheduler: Scheduler
    ahead: bool = False
    """Whether a step is scheduled before the tokens of the step before have come."""
    seconds: float = 0.1
    """Between steps."""
    requests: list[Request] = field(default_factory=list)
    stories: dict[str, Story] = field(default_factory=dict)
    names: dict[bytes, list[int]] = field(default_factory=dict)
    in_flight: deque[tuple[SchedulerOutput, list[list[list[int]]]]] = field(default_factory=deque)
    decisions: list[Any] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    first_steps: dict[str, int] = field(default_factory=dict)
    """In which step a request's first token was sampled."""
    now: float = 0.0
    num_steps: int = 0
    expected: SchedulerCounters = field(default_factory=SchedulerCounters)
    """Counters by brute force."""

    def __post_init__(self) -> None:
        self.config = self.scheduler.config
        self.caches = [Cache(self.config) for _ in self.scheduler.replicas]

    # -- what is done to it ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Request:
        request.metrics.arrival_time = self.now
        self.scheduler.add(request)
        self.scheduler.check_integrity()
        self.requests.append(request)
        story = self.stories[request.request_id] = Story.of(request, self.config)
        self.names |= story.names
        return request

    def abort(self, request: Request) -> None:
        self.end(request, back=0)

    def end(self, request: Request, back: int) -> None:
        """Abort the request, or end it because of a stop string: without its last ``back`` output tokens."""
        if not back:
            self.scheduler.finish(request, "abort")
        elif request.output_token_ids:
            self.scheduler.finish(request, "stop", "word", keep=max(0, len(request.output_token_ids) - back))
        self.scheduler.check_integrity()

    def step(self) -> SchedulerOutput:
        """Schedule a step and let the device run it; bring the tokens of the last one, or of the one before."""
        before = {r.request_id: (r.slot, r.num_computed_tokens, r.num_in_flight) for r in self.requests}
        never_preempted = {r.request_id for r in self.requests if r.progress_mark < 0}
        output = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        self.now, self.num_steps = self.now + self.seconds, self.num_steps + 1
        self._check_rows(output, before)
        self._count(output, never_preempted)
        self.decisions.append(output.decision())
        self.digests.append(output.digest())
        self.in_flight.append((output, self._run(output)))
        if output.is_empty or not self.ahead:
            self.drain()
        elif len(self.in_flight) > 1:
            self._update()
        return output

    def drain(self) -> None:
        while self.in_flight:
            self._update()

    def finish(self, limit: int | None = None) -> int:
        """Step until nothing is left, at most ``limit`` times; how many steps it took."""
        limit = self.bound() if limit is None else limit
        for count in range(limit + 1):
            if not self.scheduler.has_unfinished:
                self.drain()
                self.check_end()
                return count
            waits = bool(self.in_flight)
            output = self.step()
            assert waits or not output.is_empty or self.may_be_empty, "nothing runs, and nothing will"
        raise AssertionError(f"requests are left after {limit} steps")

    @property
    def may_be_empty(self) -> bool:
        return any(t.max_tokens_per_second is not None for t in self.config.fairness.tenants.values())

    def bound(self) -> int:
        """Steps within which everything is done, also if every token meant computing the request again."""
        budget = self.config.max_num_batched_tokens
        lengths = [r.num_prompt_tokens + r.max_tokens for r in self.requests]
        bound = sum(4 + length * (2 + length // budget) for length in lengths)
        return bound + (int(sum(lengths) * 4 / self.seconds) if self.may_be_empty else 0)

    def by_name(self, name: str) -> Request:
        return next(r for r in self.requests if r.request_id == name)

    # -- the device --------------------------------------------------------------------------------------------------

    def _run(self, output: SchedulerOutput) -> list[list[list[int]]]:
        """The tokens that the step samples."""
        sampled = []
        for replica, (cache, rows) in enumerate(zip(self.caches, output.replicas, strict=True)):
            for handle in (handle for owner, handle in output.dropped if owner == replica):
                del cache.host[handle]
            cache.move(output, replica)
            stories = [self.stories[s.request.request_id] for s in rows]
            for s, story in zip(rows, stories, strict=True):
                cache.write(s, story)
            for s, story in zip(rows, stories, strict=True):
                cache.read(s, story)
            sampled.append([self._sample(s, story) for s, story in zip(rows, stories, strict=True)])
            self._check_names(self.scheduler.replicas[replica], cache)
        return sampled

    def _sample(self, s: Scheduled, story: Story) -> list[int]:
        if s.samples:
            self.first_steps.setdefault(s.request.request_id, self.num_steps)
        last = s.start + s.count if s.samples <= 1 else s.start + 1
        return story.tokens[last : last + s.samples]

    def _check_names(self, replica: Replica, cache: Cache) -> None:
        """What can be found by a name is what the name says."""
        for group, contents in zip(replica.kv.groups, cache.groups, strict=True):
            for name, cells in self.names.items():
                block = group.pool.find(name)
                assert block is None or contents[block] == cells, "a name leads to the wrong contents"
            assert group.pool.num_named == sum(group.pool.find(name) is not None for name in self.names)

    def _update(self) -> None:
        output, tokens = self.in_flight.popleft()
        alive = [s.request for rows in output.replicas for s in rows if s.request.status is not Status.FINISHED]
        before = {r.request_id: len(r.output_token_ids) for r in alive}
        advanced = self.scheduler.update(output, tokens)
        self.scheduler.check_integrity()
        for a in advanced:
            assert a.request.output_token_ids[before[a.request.request_id] :] == a.token_ids != []
        if not self.in_flight:
            assert not any(r.num_in_flight for r in self.requests if r.status is not Status.FINISHED)

    # -- what must hold ----------------------------------------------------------------------------------------------

    def _check_rows(self, output: SchedulerOutput, before: dict[str, tuple[int | None, int, int]]) -> None:
        config = self.config
        assert output.num_rows <= config.max_num_batched_tokens
        assert output.num_steps in (1, config.num_scheduler_steps)
        for replica, rows in zip(self.scheduler.replicas, output.replicas, strict=True):
            assert len(replica.running) <= config.max_num_seqs
            partial = sum(r.num_computed_tokens < r.num_prompt_tokens for r in replica.running)
            assert not config.max_num_partial_prefills or partial <= config.max_num_partial_prefills
            assert len({s.slot for s in rows}) == len({s.request.request_id for s in rows}) == len(rows)
            for s in rows:
                self._check_row(s, output, *before[s.request.request_id])
            for i in range(len(config.windows)):
                written = [
                    block for s in rows for block in s.tables[i][s.start // config.block_size :][: _blocks(s, config)]
                ]
                assert len(set(written)) == len(written), "two requests write to one block"
        for request in output.preempted:
            assert request.slot is None and before[request.request_id][0] is not None

    def _check_row(
        self, s: Scheduled, output: SchedulerOutput, slot: int | None, computed: int, in_flight: int
    ) -> None:
        request, end = s.request, s.start + s.count
        assert s.count >= 1 and request.status is Status.RUNNING and request.slot == s.slot
        assert request.num_computed_tokens == end <= self.config.max_model_len
        assert s.is_new == (slot is None or request in output.preempted)
        assert s.is_new or (s.slot == slot and s.start == computed)
        # What the host does not know is on the device, in the slot that the request has kept.
        assert end <= request.num_tokens + (s.samples - 1 if output.num_steps > 1 else 0) + in_flight
        assert not (s.is_new and in_flight) and not (request.waits_for_tokens and in_flight)
        total = request.num_tokens + in_flight
        if output.num_steps > 1:
            assert s.start + 1 == total and 1 <= s.samples == s.count <= output.num_steps
            assert not request.single_steps and not request.waits_for_tokens
        else:
            assert s.samples == (end == total) and end <= total
        if s.is_new and request.progress_mark >= 0:  # it gets to its next token, whatever others do
            full = (t for t, window in zip(s.tables, self.config.windows, strict=True) if window is None)
            assert all(len(table) * self.config.block_size >= request.num_tokens for table in full)
        assert self.config.enable_chunked_prefill or s.samples
        assert request.num_tokens_left >= 0

    def _count(self, output: SchedulerOutput, never_preempted: set[str]) -> None:
        expected, size = self.expected, self.config.block_size
        expected.num_preemptions += len(output.preempted)
        expected.num_swapped_out += len(output.swap_outs)
        moves = [blocks for move in (*output.swap_outs, *output.swap_ins) for blocks in move.blocks]
        expected.num_blocks_moved += sum(map(len, moves))
        if not output.is_empty:
            tokens = [s.count for rows in output.replicas for s in rows]
            at_once = 1 if output.num_steps > 1 else max(tokens)
            sizes = self.config.decode_buckets if at_once == 1 else self.config.token_buckets
            rows = min((n for n in sizes if n >= output.num_rows), default=output.num_rows)
            expected.num_padding_rows += rows * output.num_steps * len(output.replicas) - sum(tokens)
        for s in (s for rows in output.replicas for s in rows if s.is_new):
            if s.request.request_id in never_preempted:
                expected.prefix_cache_queries += s.request.num_prompt_tokens
                expected.prefix_cache_hits += s.start
                assert s.request.num_cached_tokens == s.start
        for replica in self.scheduler.replicas:
            for i, group in enumerate(replica.kv.groups):
                filled = Counter[int]()
                for request in replica.running:
                    for at, block in enumerate(replica.kv.tables(request)[i]):
                        tokens = min(size, max(0, request.num_computed_tokens - at * size))
                        filled[block] = max(filled[block], tokens)
                del filled[NULL_BLOCK]
                expected.held_slots += len(filled) * size
                expected.live_slots += sum(filled.values())
                if replica.blocks_ran_out:
                    expected.withheld_slots += (group.pool.num_usable - len(filled)) * size
        actual = self.scheduler.counters
        expected.num_rejected, expected.rejected_tokens = actual.num_rejected, actual.rejected_tokens
        assert actual == expected

    def check_end(self) -> None:
        """Everybody said what they would have said alone; nothing is held any more."""
        for request in self.requests:
            story, start = self.stories[request.request_id], request.num_prompt_tokens
            said, alone = request.output_token_ids, story.tokens[start : story.length]
            assert request.status is Status.FINISHED
            if request.finish_reason == "abort" or request.stop_reason == "word":
                assert said == alone[: len(said)]
            else:
                assert said == alone
                ended = story.tokens[story.length - 1]
                stopped = ended in request.stop_token_ids and len(alone) > request.params.min_tokens
                ending = ("stop", ended) if stopped else ("length", None)
                assert (request.finish_reason, request.stop_reason) == ending
        for replica in self.scheduler.replicas:
            assert all(group.pool.num_free == group.pool.num_usable for group in replica.kv.groups)
            assert (replica.load, replica.host.num_used) == (0, 0)
        self.step()
        assert not any(cache.host for cache in self.caches)


def _blocks(s: Scheduled, config: SchedulerConfig) -> int:
    """Blocks that the row writes to."""
    return (s.start + s.count - 1) // config.block_size - s.start // config.block_size + 1


def starts(output: SchedulerOutput, replica: int = 0) -> dict[str, int]:
    """Where the step begins in each request: behind what the cache had, for a new one."""
    return {s.request.request_id: s.start for s in output.replicas[replica]}


def counts(output: SchedulerOutput, replica: int = 0) -> dict[str, int]:
    """Tokens of each request, in the order of the rows."""
    return {s.request.request_id: s.count for s in output.replicas[replica]}


def names_of(requests: Iterable[Request]) -> list[str]:
    return [r.request_id for r in requests]
