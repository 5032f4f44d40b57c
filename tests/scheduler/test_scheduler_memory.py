"""How well KV memory is used, and what stages change about a schedule."""

from __future__ import annotations

from random import Random

import pytest
from harness import make_config, make_request

from jaxserve.metrics import EngineMetrics
from jaxserve.scheduler import Scheduler


def drive(scheduler: Scheduler, ahead: int = 0) -> list[dict[str, int]]:
    """Steps until nothing is left, tokens ``ahead`` steps late; which requests had how many tokens in each."""
    outputs, steps = [], []
    while scheduler.has_unfinished:
        outputs.append(scheduler.schedule())
        steps.append({s.request.request_id: s.count for rows in outputs[-1].replicas for s in rows})
        if len(outputs) > ahead:
            output = outputs.pop(0)
            scheduler.update(output, [[[1] * s.samples for s in rows] for rows in output.replicas])
        scheduler.check_integrity()
    return steps


@pytest.mark.parametrize("num_blocks", [2000, 200])
def test_blocks_are_full_on_a_mixed_workload(num_blocks: int) -> None:
    """Prompts of 32 to 256 tokens, outputs of 16 to 256, blocks of 16: at least 95 % of the slots hold a token."""
    draw = Random(1)
    config = make_config(
        max_model_len=512, max_num_seqs=32, max_num_batched_tokens=512, block_size=16, num_blocks=num_blocks
    )
    scheduler = Scheduler(config)
    for i in range(96):
        prompt = [draw.randrange(50) for _ in range(draw.randint(32, 256))]
        scheduler.add(make_request(f"r{i}", prompt, draw.randint(16, 256)))
    drive(scheduler)
    metrics = EngineMetrics(scheduler.counters)
    assert metrics.kv_efficiency >= 0.95
    assert metrics.kv_internal_fragmentation == pytest.approx(1 - metrics.kv_efficiency)
    assert (metrics.kv_external_fragmentation > 0) == (scheduler.counters.num_preemptions > 0) == (num_blocks == 200)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_request_comes_back_when_its_token_is_out(stages: int, ahead: int) -> None:
    """A sampled token takes ``stages`` steps; chunks of a prompt follow each other at once."""
    scheduler = Scheduler(make_config(num_stages=stages))
    scheduler.add(make_request("a", range(20), 4))
    steps = drive(scheduler, stages - 1 + ahead)
    has_tokens = [i for i, step in enumerate(steps) if step]
    assert has_tokens == [0, 1, 1 + stages, 1 + 2 * stages, 1 + 3 * stages]


@pytest.mark.parametrize(("stages", "count"), [(2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
def test_who_decodes_is_spread_over_the_steps(stages: int, count: int) -> None:
    scheduler = Scheduler(make_config(num_stages=stages, max_num_seqs=4))
    for i in range(count):
        scheduler.add(make_request(f"r{i}", [i], 20))
    steps = drive(scheduler, stages - 1)
    settled = steps[3 * stages : 12 * stages]
    assert all(settled), "a stage idles"
    assert {len(step) for step in settled} <= {count // stages, -(-count // stages)}


def test_slots_rest_until_the_pipeline_is_through() -> None:
    """A slot's sampler row is read when its batch leaves the last stage: nobody else may have it before."""
    scheduler = Scheduler(make_config(num_stages=3, max_num_seqs=1))
    for name in "ab":
        scheduler.add(make_request(name, [1], 1))
    steps = drive(scheduler, 2)
    entered = {name: i for i, step in enumerate(steps) for name in step}
    assert entered["b"] - entered["a"] > 3
