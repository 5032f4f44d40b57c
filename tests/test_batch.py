"""A schedule laid out as arrays, against the obvious way to do it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.batch import FLOAT_FIELDS, Batch, BatchLayout, Features, build_batch
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request
from jaxserve.runner import RunnerConfig, unpack
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduled, SchedulerOutput

BLOCK_SIZE = 4
LAYOUT = BatchLayout(num_tokens=40, num_seqs=5, num_blocks=8)


def make_request(prompt: list[int], output: list[int], seed: int = 0, **params: Any) -> Request:
    metrics = RequestMetrics(arrival_time=0.0)
    return Request("r", prompt, SamplingParams(**params), seed, frozenset(), 9, metrics, output_token_ids=output)


token_ids = st.integers(0, 2**31 - 1)


@st.composite
def scheduled(draw: st.DrawFn, most: int = 8) -> Scheduled:
    """Any part of any request: of its prompt, across into its output, or its last token alone."""
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
    start = draw(st.integers(0, request.num_tokens - 1))
    count = draw(st.integers(1, min(most, request.num_tokens - start)))
    blocks = draw(st.lists(st.integers(1, 99), min_size=-(-(start + count) // BLOCK_SIZE), max_size=8))
    return Scheduled(request, start, count, blocks, draw(st.integers(0, 3)), is_new=draw(st.booleans()))


replicas = st.lists(st.lists(scheduled(), max_size=5), min_size=1, max_size=3)


@given(replicas)
def test_arrays(replicas: list[list[Scheduled]]) -> None:
    batch = build_batch(SchedulerOutput(replicas), LAYOUT, BLOCK_SIZE)
    for replica, rows in enumerate(replicas):
        arrays = {name: batch.array(name)[replica] for name in LAYOUT.fields}
        at = 0
        for row, s in enumerate(rows):
            tokens = s.request.prompt_token_ids + s.request.output_token_ids
            for position in range(s.start, s.start + s.count):
                assert arrays["token_ids"][at] == tokens[position]
                assert arrays["positions"][at] == position
                assert arrays["rope_lens"][at] == max(position + 1, s.request.num_prompt_tokens)
                block, offset = divmod(position, BLOCK_SIZE)
                assert arrays["slot_mapping"][at] == s.blocks[block] * BLOCK_SIZE + offset
                at += 1
            check_row({name: arrays[name][row] for name in arrays if arrays[name].shape[0] == LAYOUT.num_seqs}, s)
            assert arrays["cu_q_lens"][row + 1] == at
            assert arrays["logits_indices"][row] == at - 1
        check_padding(arrays, len(rows), at)


def check_row(row: dict[str, Any], s: Scheduled) -> None:
    params = s.request.params
    assert row["kv_lens"] == s.start + s.count
    assert row["block_tables"].tolist() == s.blocks + [0] * (LAYOUT.num_blocks - len(s.blocks))
    assert row["samples"] == (s.start + s.count == s.request.num_tokens)
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
        assert not arrays[name][num_tokens:].any()
    for name in ("kv_lens", "block_tables", "logits_indices", "samples", "slots", "temperature", "top_k"):
        assert not arrays[name][num_rows:].any()
    assert (arrays["repetition_penalty"][num_rows:] == 1).all()


@given(replicas)
def test_the_device_cuts_the_buffer_as_the_host_does(replicas: list[list[Scheduled]]) -> None:
    batch = build_batch(SchedulerOutput(replicas), LAYOUT, BLOCK_SIZE)
    buffer = jnp.asarray(batch.buffer)
    for name in LAYOUT.fields:
        np.testing.assert_array_equal(unpack(buffer, LAYOUT, name), batch.array(name))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 20))
def test_a_layout_has_room_for_everything_once(num_tokens: int, num_seqs: int, num_blocks: int) -> None:
    layout = BatchLayout(num_tokens, num_seqs, num_blocks)
    batch = Batch(layout, np.zeros((2, layout.num_words), np.int32), Features())
    for value, name in enumerate(layout.fields, 1):
        array = batch.array(name)
        assert not array.any()  # nobody else has written here
        array[:] = value
        assert array.dtype == (np.float32 if name in FLOAT_FIELDS else np.int32)
    assert batch.buffer.all()
    assert batch.array("block_tables").shape == (2, num_seqs, num_blocks)
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
        Scheduled(make_request([1], [], **params), 0, 1, [1], 0, is_new=True)
        for params in ({"temperature": 0, "frequency_penalty": 1.0}, {"top_k": 3}, {"temperature": 0})
    ]
    batch = build_batch(SchedulerOutput([rows[:1], rows[1:]]), LAYOUT, BLOCK_SIZE)
    assert batch.features == Features(sampling=True, truncation=True, penalties=True)
    assert batch.features.as_array().tolist() == [1, 1, 1, 0]
    assert build_batch(SchedulerOutput([rows[2:]]), LAYOUT, BLOCK_SIZE).features == Features()


def test_the_smallest_layout_with_room_is_taken() -> None:
    config = RunnerConfig((2, 8), (16, 64), 8, 10, 4, np.dtype(np.float32))

    def layout(num_tokens: int, one_token_each: bool) -> tuple[int, int, bool]:
        found = config.layout(num_tokens, one_token_each)
        assert found in config.layouts and found.num_blocks == 10
        return found.num_tokens, found.num_seqs, found.one_token_each

    assert [layout(n, True) for n in (1, 2, 3, 8)] == [(2, 2, True)] * 2 + [(8, 8, True)] * 2
    assert [layout(n, False) for n in (1, 16, 17, 64)] == [(16, 8, False)] * 2 + [(64, 8, False)] * 2
    assert config.layouts[-1].num_tokens == 64 and len(config.layouts) == 4
