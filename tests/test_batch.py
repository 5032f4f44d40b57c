"""A schedule laid out as arrays, against the obvious way to do it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.batch import FLOAT_FIELDS, SAMPLING_FIELDS, Batch, BatchBuilder, BatchLayout, Features, sampling_words
from jaxserve.config import SchedulerConfig
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request
from jaxserve.runner import RunnerConfig
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduled, SchedulerOutput
from jaxserve.step import unpack

BLOCK_SIZE = 4
LAYOUT = BatchLayout(num_tokens=40, num_seqs=5, num_blocks=8, num_groups=2)


def builder(num_replicas: int) -> BatchBuilder:
    config = SchedulerConfig(32, 5, 40, BLOCK_SIZE, 100, windows=(None, 6), num_replicas=num_replicas)
    return BatchBuilder(config)


def build(replicas: list[list[Scheduled]], layout: BatchLayout = LAYOUT) -> Batch:
    return builder(len(replicas)).build(SchedulerOutput(replicas), layout)


def make_request(prompt: list[int], output: list[int], seed: int = 0, **params: Any) -> Request:
    metrics = RequestMetrics(arrival_time=0.0)
    return Request("r", prompt, SamplingParams(**params), seed, frozenset(), 9, metrics, output_token_ids=output)


token_ids = st.integers(0, 2**31 - 1)


@st.composite
def scheduled(draw: st.DrawFn, slot: int, most: int = 8) -> Scheduled:
    """Any part of any request: of its prompt, across into its output, its last token alone, or one in flight."""
    prompt, output = draw(st.lists(token_ids, min_size=1, max_size=20)), draw(st.lists(token_ids, max_size=11))
    params = {
        "temperature": draw(st.sampled_from([0, 0.5])),
        "top_k": draw(st.integers(-1, 50)),
        "top_p": draw(st.floats(0.1, 1.0)),
        "min_p": draw(st.floats(0.0, 1.0)),
        "presence_penalty": draw(st.floats(-2, 2)),
        "frequency_penalty": draw(st.floats(-2, 2)),
        "repetition_penalty": draw(st.floats(0.5, 2)),
    }
    request = make_request(prompt, output, draw(st.integers(0, 2**64 - 1)), **params)
    start = draw(st.integers(0, min(request.num_tokens, 30)))
    count = draw(st.integers(1, max(1, min(most, request.num_tokens - start))))
    blocks = st.lists(st.integers(1, 99), min_size=-(-(start + count) // BLOCK_SIZE), max_size=8)
    return Scheduled(request, start, count, [draw(blocks), draw(blocks)], slot, True, draw(st.integers(0, 1)))


@st.composite
def some_rows(draw: st.DrawFn) -> list[Scheduled]:
    return [draw(scheduled(slot)) for slot in draw(st.permutations(range(5)))[: draw(st.integers(0, 5))]]


replicas = st.lists(some_rows(), min_size=1, max_size=3)


@given(replicas)
def test_arrays(replicas: list[list[Scheduled]]) -> None:
    batch = build(replicas)
    for replica, rows in enumerate(replicas):
        arrays = {name: batch.array(name)[replica] for name in LAYOUT.fields}
        at = 0
        for row, s in enumerate(rows):
            tokens = [*s.request.prompt_token_ids, *s.request.output_token_ids, -1 - s.slot]
            for position in range(s.start, s.start + s.count):
                assert arrays["token_ids"][at] == tokens[position]
                assert arrays["positions"][at] == position
                assert arrays["rope_lens"][at] == max(position + 1, s.request.num_prompt_tokens)
                block, offset = divmod(position, BLOCK_SIZE)
                for group in range(2):
                    place = s.tables[group][block] * BLOCK_SIZE + offset
                    assert arrays["slot_mapping"][group][at] == place
                at += 1
            for group, table in enumerate(arrays["block_tables"][:, row]):
                assert table.tolist() == s.tables[group] + [0] * (LAYOUT.num_blocks - len(s.tables[group]))
            check_row({name: arrays[name][row] for name in arrays if arrays[name].shape[0] == LAYOUT.num_seqs}, s)
            assert arrays["cu_q_lens"][row + 1] == at
            assert arrays["logits_indices"][row] == at - 1
        check_padding(arrays, len(rows), at)


def check_row(row: dict[str, Any], s: Scheduled) -> None:
    params = s.request.params
    assert row["kv_lens"] == s.start + s.count
    assert row["samples"] == s.samples
    assert row["slots"] == s.slot
    assert int(row["seed_high"]) % 2**32 * 2**32 + int(row["seed_low"]) % 2**32 == s.request.seed
    assert row["top_k"] == max(params.top_k, 0)
    for name in FLOAT_FIELDS:
        assert row[name] == np.float32(getattr(params, name))


def check_padding(arrays: dict[str, np.ndarray], num_rows: int, num_tokens: int) -> None:
    """Padding tokens are written to block 0; padding sequences have no tokens and change no logits."""
    assert arrays["cu_q_lens"][0] == 0
    assert (arrays["cu_q_lens"][num_rows + 1 :] == num_tokens).all()
    for name in ("token_ids", "positions", "rope_lens", "slot_mapping"):
        assert not arrays[name][..., num_tokens:].any()
    assert not arrays["block_tables"][:, num_rows:].any()
    for name in ("kv_lens", "logits_indices", "samples", "slots", "temperature", "top_k"):
        assert not arrays[name][num_rows:].any()
    assert (arrays["repetition_penalty"][num_rows:] == 1).all()


@given(replicas)
def test_the_device_cuts_the_buffer_as_the_host_does(replicas: list[list[Scheduled]]) -> None:
    batch = build(replicas)
    buffer = jnp.asarray(batch.buffer)
    for name in LAYOUT.fields:
        np.testing.assert_array_equal(unpack(buffer, LAYOUT, name), batch.array(name))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 20))
def test_a_layout_has_room_for_everything_once(num_tokens: int, num_seqs: int, num_blocks: int) -> None:
    layout = BatchLayout(num_tokens, num_seqs, num_blocks, num_groups=3)
    batch = Batch(layout, np.zeros((2, layout.num_words), np.int32), Features())
    for value, name in enumerate(layout.fields, 1):
        array = batch.array(name)
        assert not array.any()  # nobody else has written here
        array[:] = value
        assert array.dtype == (np.float32 if name in FLOAT_FIELDS else np.int32)
    assert batch.buffer.all()
    assert batch.array("block_tables").shape == (2, 3, num_seqs, num_blocks)
    assert batch.array("slot_mapping").shape == (2, 3, num_tokens)
    assert batch.array("cu_q_lens").shape == (2, num_seqs + 1)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"temperature": 0}, Features()),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, Features()),
        ({}, Features(sampling=True)),
        ({"top_k": 5}, Features(sampling=True, truncation=True)),
        ({"top_p": 0.9}, Features(sampling=True, truncation=True)),
        ({"min_p": 0.1}, Features(sampling=True, truncation=True)),
        ({"top_k": -1, "top_p": 1.0}, Features(sampling=True)),
        ({"temperature": 0, "presence_penalty": 0.1}, Features(penalties=True)),
        ({"temperature": 0, "frequency_penalty": -0.1}, Features(penalties=True)),
        ({"temperature": 0, "repetition_penalty": 0.9}, Features(penalties=True)),
        ({"temperature": 0, "logit_bias": {1: 1.0}}, Features(logit_bias=True)),
        ({"temperature": 0, "allowed_token_ids": [1]}, Features(logit_bias=True)),
        ({"temperature": 0, "bad_words": ["a"]}, Features(logit_bias=True)),
        ({"temperature": 0, "min_tokens": 1}, Features(logit_bias=True)),
    ],
    ids=str,
)
def test_features(params: dict[str, Any], wanted: Features) -> None:
    assert Features.of(SamplingParams(**params)) == wanted


def test_a_batch_wants_what_any_of_its_rows_wants() -> None:
    rows = [
        Scheduled(make_request([1], [], **params), 0, 1, [[1], [1]], slot, True, 1)
        for slot, params in enumerate(({"temperature": 0, "frequency_penalty": 1.0}, {"top_k": 3}, {"temperature": 0}))
    ]
    batch = build([rows[:1], rows[1:]])
    assert batch.features == Features(sampling=True, truncation=True, penalties=True)
    assert batch.features.as_array().tolist() == [1, 1, 1, 0]
    assert build([rows[2:]]).features == Features()


def test_a_slot_keeps_what_does_not_change() -> None:
    """Later rows of a request add to its table; the next request in the slot starts afresh."""
    batches, request, table = builder(1), make_request([1] * 9, [], top_k=7), [3]
    rows = [Scheduled(request, 0, 4, [table, [4]], 2, True, 0)]
    batches.build(SchedulerOutput([rows]), LAYOUT)
    table.append(5)
    rows = [Scheduled(request, 4, 4, [table, [4, 6]], 2, False, 0)]
    later = batches.build(SchedulerOutput([rows]), LAYOUT)
    assert later.array("block_tables")[0, :, 0, :3].tolist() == [[3, 5, 0], [4, 6, 0]]
    assert later.array("slot_mapping")[0, :, :4].tolist() == [[20, 21, 22, 23], [24, 25, 26, 27]]
    assert later.array("top_k")[0, 0] == 7
    rows = [Scheduled(make_request([1] * 9, [], top_k=8), 0, 2, [[9], [8]], 2, True, 0)]
    other = batches.build(SchedulerOutput([rows]), LAYOUT)
    assert other.array("block_tables")[0, :, 0, 0].tolist() == [9, 8]
    assert other.array("top_k")[0, 0] == 8


def test_the_rows_of_several_steps_in_one_have_one_token_each() -> None:
    layout = BatchLayout(4, 4, 8, one_token_each=True, num_groups=1, num_steps=3)
    config = SchedulerConfig(32, 4, 40, BLOCK_SIZE, 100)
    rows = [
        Scheduled(make_request([1, 2, 3], [8]), 3, 3, [[5, 7]], 1, True, 3),
        Scheduled(make_request([1, 2, 3], [9]), 4, 2, [[6, 8]], 0, True, 2),
    ]
    batch = BatchBuilder(config).build(SchedulerOutput([rows], num_steps=3), layout)
    got = {
        name: batch.array(name)[0].tolist() for name in ("token_ids", "positions", "kv_lens", "samples", "cu_q_lens")
    }
    assert got == {
        "token_ids": [8, -1, 0, 0],
        "positions": [3, 4, 0, 0],
        "kv_lens": [4, 5, 0, 0],
        "samples": [3, 2, 0, 0],
        "cu_q_lens": [0, 1, 2, 2, 2],
    }


def test_every_step_that_can_be_scheduled_is_compiled() -> None:
    limits = SchedulerConfig(40, 8, 64, 4, 100, decode_buckets=(2, 8), token_buckets=(16, 64))
    config = RunnerConfig((2, 8), (16, 64), 8, 10, 4, np.dtype(np.float32), num_steps=4)

    def layout(num_rows: int, one_token_each: bool, steps: int = 1) -> tuple[int, int, bool]:
        found = config.layout(limits.bucket(num_rows, one_token_each), one_token_each, steps)
        assert found in config.layouts and found.num_blocks == 10
        return found.num_tokens, found.num_seqs, found.one_token_each

    assert [layout(n, True) for n in (1, 2, 3, 8)] == [(2, 2, True)] * 2 + [(8, 8, True)] * 2
    assert [layout(n, True, 4) for n in (1, 8)] == [(2, 2, True), (8, 8, True)]
    assert [layout(n, False) for n in (1, 16, 17, 64)] == [(16, 8, False)] * 2 + [(64, 8, False)] * 2
    assert config.layouts[-1].num_tokens == 64 and len(config.layouts) == 6


def test_more_likeliest_tokens_than_any_vocabulary_has() -> None:
    words = dict(zip(SAMPLING_FIELDS, sampling_words(SamplingParams(top_k=2**40), 0), strict=True))
    assert words["top_k"] == 2**31 - 1
