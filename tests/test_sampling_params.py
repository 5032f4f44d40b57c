"""Every parameter is normalised, and refused with one line that names it when it is wrong."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxserve.sampling_params import RequestOutputKind, SamplingParams


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert params.stop == params.stop_token_ids == params.bad_words == params.logit_bias == ()
    assert params.allowed_token_ids is None
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert not params.greedy


def test_constructor_and_fields_agree_in_order():
    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    assert list(inspect.signature(SamplingParams).parameters) == fields
    assert not hasattr(SamplingParams(), "__dict__")


def test_values_are_normalised():
    from_numpy: Any = np.array([3, 2])
    by_digits: Any = {"5": 1, 7: -100.0}
    params = SamplingParams(
        temperature=0,
        seed=-1,
        stop="\n",
        stop_token_ids=from_numpy,
        logit_bias=by_digits,
        allowed_token_ids=[1],
        bad_words=["x"],
        max_tokens=None,
        extra_args={},
    )
    assert params.greedy
    assert isinstance(params.temperature, float)
    assert params.seed is None
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (3, 2)
    assert all(type(token_id) is int for token_id in params.stop_token_ids)
    assert params.logit_bias == ((5, 1.0), (7, -100.0))
    assert params.allowed_token_ids == (1,)
    assert params.bad_words == ("x",)
    assert params.max_tokens is None
    assert params.extra_args is None


@pytest.mark.parametrize(
    "accepted",
    [
        *({"presence_penalty": value} for value in (-2, 2.0)),
        {"repetition_penalty": 0.01},
        {"temperature": 1e-5},
        {"top_p": 1},
        {"top_k": -1},
        {"min_p": 1.0},
        *({"seed": seed} for seed in (0, -7, 2**70)),
        {"max_tokens": 5, "min_tokens": 5},
        {"max_tokens": None, "min_tokens": 500},
        *({"logprobs": value, "prompt_logprobs": value} for value in (-1, 0, 20)),
        {"detokenize": False},
        {"detokenize": False, "stop": []},
        {"output_kind": RequestOutputKind.DELTA},
    ],
)
def test_allowed_values(accepted):
    params = SamplingParams(**accepted)
    for name, value in accepted.items():
        assert getattr(params, name) == (value if value != [] else ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, -1, True, 1.0, "1", None)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, "0", None, True, float("nan"))),
        ("frequency_penalty", 2.5),
        *(("repetition_penalty", value) for value in (0, -1.0, float("inf"))),
        *(("repetition_penalty", value) for value in (1e-40, 1e39)),
        *(("temperature", value) for value in (-0.1, 1e-6, float("nan"), float("inf"), 1e300, None)),
        *(("top_p", value) for value in (0, 1.01, -1, 1e-40)),
        *(("top_k", value) for value in (-2, 1.5, True)),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("seed", value) for value in (1.0, "1", True)),
        *(("stop", value) for value in ("", ["a", ""], [1], 5, b"x", {"a": 1})),
        *(("stop_token_ids", value) for value in ([-1], [1.0], ["1"], [True], 5, "5")),
        *(("max_tokens", value) for value in (0, -1, 1.0, True)),
        *(("min_tokens", value) for value in (-1, 17, None, 1.0)),
        *(("logprobs", value) for value in (-2, True, 1.0)),
        ("prompt_logprobs", -2),
        *((flag, 1) for flag in ("ignore_eos", "detokenize", "skip_special_tokens")),
        ("spaces_between_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
        ("output_kind", 1),
        *(("logit_bias", value) for value in ({1: 101}, {1: -100.5}, {-1: 0.0}, {"-1": 0.0}, {"x": 0.0})),
        *(("logit_bias", value) for value in ({1: "1"}, {1: float("nan")}, {1: 0.0, "1": 1.0}, [1, 2], 3)),
        *(("allowed_token_ids", value) for value in ([], [-1], 3)),
        *(("bad_words", value) for value in ("bad", [""], [1])),
        ("extra_args", {"a": 1}),
    ],
)
def test_refused_values(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match=r"stop .*detokenize=True"):
        SamplingParams(stop=["x"], detokenize=False)


def test_what_is_not_supported_is_named():
    with pytest.raises(NotImplementedError, match="structured_outputs"):
        SamplingParams(structured_outputs={"json": {}})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # pyright: ignore[reportCallIssue]


def test_objects_are_values():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, stop_token_ids=[4], allowed_token_ids=[1, 2])
    for same in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params)):
        assert same == params
    assert hash(dataclasses.replace(params)) == hash(params)
    assert dataclasses.replace(params, temperature=0.0).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(params, top_p=2.0)


def test_all_stop_token_ids():
    params = SamplingParams(stop_token_ids=[9, 3])
    assert params.all_stop_token_ids([5, 3]) == (3, 5, 9)
    assert dataclasses.replace(params, ignore_eos=True).all_stop_token_ids([5]) == (3, 9)


@pytest.mark.parametrize(
    "asked",
    [{"stop_token_ids": [10]}, {"logit_bias": {10: 1.0}}, {"allowed_token_ids": [1, 10]}, {"logprobs": 11}],
)
def test_check_vocabulary(asked):
    (name,) = asked
    params = SamplingParams(**asked)
    params.check_vocabulary(11)
    with pytest.raises(ValueError, match=name):
        params.check_vocabulary(10)


def test_outputs_start_unfinished():
    completion = CompletionOutput(index=0, text="", token_ids=[])
    output = RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1], outputs=[completion], metrics=RequestMetrics(0.0)
    )
    assert not output.finished
    assert not completion.finished()
    completion.finish_reason = "stop"
    assert completion.finished()
    assert Logprob(-0.5, 1).decoded_token is None
