"""Every malformed parameter is refused by name; every accepted one is kept."""

from __future__ import annotations

import math

import pytest

from skimp.decoding import ParamsError, RowState, SamplingParams, resolve_bad_words
from skimp.errors import SkimpError

BAD = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", True),
    ("max_tokens", 1.0),
    ("max_tokens", "5"),
    ("max_tokens", 2**31),
    ("max_tokens", 10**5000),
    ("min_tokens", -1),
    ("min_tokens", None),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", True),
    ("temperature", "1"),
    ("temperature", 100.1),
    ("temperature", 10**400),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", False),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("presence_penalty", 2.1),
    ("presence_penalty", None),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.nan),
    ("logit_bias", [1, 2]),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {True: 1.0}),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {10**5000: 1.0}),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", ["  "]),
    ("bad_words", [[]]),
    ("bad_words", [[-1]]),
    ("bad_words", [[1.0]]),
    ("bad_words", [["a"]]),
    ("bad_words", [7]),
    ("bad_words", ["x"] * 257),
    ("bad_words", [[1] * 65]),
    ("bad_words", ["x" * 257]),
    ("stop", [""]),
    ("stop", [3]),
    ("stop", ["a"] * 65),
    ("stop", ["a" * 1025]),
    ("stop", ["\ud800"]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 3),
    ("stop_token_ids", list(range(257))),
    ("ignore_eos", 1),
    ("include_stop", None),
    ("seed", 1.0),
    ("seed", True),
    ("seed", 2**63),
    ("n", 0),
    ("n", 129),
    ("n", None),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", 1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD)])
def test_malformed_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ParamsError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.field.startswith(name)
    assert str(caught.value).startswith(name)
    assert isinstance(caught.value, SkimpError)
    assert len(str(caught.value)) < 250


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(ParamsError, match=r"min_tokens.*max_tokens = 3"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ParamsError, match="best_of"):
        SamplingParams.from_dict({"best_of": 2})


def test_values_at_the_limits_are_accepted() -> None:
    for name, values in {
        "max_tokens": (None, 1, 2**31 - 1),
        "temperature": (0, 0.0, 1e-300, 100),
        "top_k": (-1, 0, 1, 2**31 - 1),
        "top_p": (1e-9, 1, 1.0),
        "min_p": (0, 1),
        "presence_penalty": (-2, 2),
        "repetition_penalty": (0.01, 100),
        "seed": (None, -(2**63), 2**63 - 1),
        "n": (1, 128),
        "logprobs": (None, 0, 20),
        "stop": ("x", ["x"], ("x", "y")),
    }.items():
        for value in values:
            SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_params_are_frozen_hashable_and_normalised() -> None:
    params = SamplingParams(stop="x", bad_words=["a", [1, 2]], logit_bias={3: 1})
    assert params.stop == ("x",)
    assert params.bad_words == ("a", (1, 2))
    assert params.logit_bias == {3: 1.0}
    assert hash(params) == hash(
        SamplingParams(stop=["x"], bad_words=["a", (1, 2)], logit_bias={3: 1})
    )
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={10: 1.0}),
        SamplingParams(stop_token_ids=[10]),
        SamplingParams(bad_words=[[1, 10]]),
    ],
)
def test_ids_outside_the_vocabulary(params: SamplingParams) -> None:
    with pytest.raises(ParamsError, match=r"outside the vocabulary 0\.\.9"):
        RowState(params, vocab_size=10)
    RowState(params, vocab_size=11)


def test_prompt_ids_outside_the_vocabulary_and_missing_sample() -> None:
    with pytest.raises(ParamsError, match="prompt_ids"):
        RowState(SamplingParams(), vocab_size=10, prompt_ids=[10])
    with pytest.raises(ParamsError, match="sample 2"):
        RowState(SamplingParams(n=2), vocab_size=10, sample_index=2)


def test_bad_word_strings_need_a_tokenizer() -> None:
    with pytest.raises(ParamsError, match=r"bad_words\[0\]"):
        RowState(SamplingParams(bad_words=["x"]), vocab_size=10)
    words = resolve_bad_words(["x", [3]], lambda text: [ord(c) % 7 for c in text])
    assert words == ((ord("x") % 7,), (32 % 7, ord("x") % 7), (3,))
    with pytest.raises(ParamsError, match="no tokens"):
        resolve_bad_words(["x"], lambda text: [])
