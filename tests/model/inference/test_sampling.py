"""Sampling: the distribution of what is drawn, and the greedy choice."""

from __future__ import annotations

import random

import pytest
import torch

from model.inference.sampling import SamplingParams, choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def frequencies(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    generators = [random.Random(i) for i in range(draws)]
    tokens = choose(LOGITS.expand(draws, -1), [params] * draws, generators)
    return torch.bincount(torch.tensor(tokens), minlength=5) / draws


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.5}, 1), ({"top_p": 0.75}, 2), ({"top_k": 3, "top_p": 0.99}, 3)],
)
def test_draws_follow_the_probabilities_of_what_is_kept(fields, kept):
    expected = (LOGITS / 0.8).softmax(-1)
    expected = torch.where(torch.arange(5) < kept, expected, 0.0)
    drawn = frequencies(SamplingParams(temperature=0.8, **fields))
    torch.testing.assert_close(drawn, expected / expected.sum(), rtol=0, atol=0.03)
    assert (drawn[kept:] == 0).all()


def test_greedy_and_sampled_rows_may_be_mixed():
    rows, params = LOGITS.expand(3, -1), [SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams()]
    assert choose(rows, params, [random.Random(0)] * 3) == [0, 0, 0]
    with pytest.raises(FloatingPointError, match="not finite"):
        choose(rows * float("nan"), params, [random.Random(0)] * 3)


def drawn(**fields) -> list[int]:
    """Twelve draws of one request."""
    params = SamplingParams(temperature=1.0, **fields)
    generator = params.generator()
    return [choose(LOGITS[None], [params], [generator])[0] for _ in range(12)]


def test_seeds_of_any_sign_and_streams_of_one_seed_differ():
    seeds = [0, 1, -1, 2, -2, 2**64, -(2**64), 2**70 + 1]
    draws = {(seed, stream): tuple(drawn(seed=seed, stream=stream)) for seed in seeds for stream in range(3)}
    assert len(set(draws.values())) == len(draws)
    assert tuple(drawn(seed=-2, stream=1)) == draws[-2, 1]
    assert drawn() != drawn()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-7, 1e-4])
def test_tiny_temperatures_are_greedy(temperature):
    rows = torch.cat([LOGITS.flip(0)[None], LOGITS[None] * 1e6, LOGITS[None] * 1e-3 + 1e4]).repeat(20, 1)
    params = SamplingParams(temperature=temperature)
    tokens = choose(rows, [params] * 60, [random.Random(i) for i in range(60)])
    assert tokens[0::3] == [4] * 20 and tokens[1::3] == [0] * 20
    assert temperature > 1e-5 or tokens[2::3] == [0] * 20  # a difference of 1e-3 is not much at 1e-4


def test_penalties_and_biases_change_the_logits_as_openai_says():
    answer = [0, 0, 1]
    cases = [
        ({"presence_penalty": 1.2}, 0),  # 0.8, -0.2, 0.5
        ({"presence_penalty": 1.6}, 2),  # 0.4, -0.6, 0.5
        ({"frequency_penalty": 0.7}, 0),  # 0.6, 0.3, 0.5
        ({"frequency_penalty": 0.8}, 2),  # 0.4, 0.2, 0.5
        ({"logit_bias": {4: 100.0}, "presence_penalty": 2.0}, 4),
        ({"logit_bias": {0: -100.0}}, 1),
        ({"frequency_penalty": -2.0, "logit_bias": {1: 3.5}}, 1),  # 6, 6.5
    ]
    for fields, expected in cases:
        assert choose(LOGITS[None], [SamplingParams(**fields)], [random.Random(0)], [answer]) == [expected], fields
    untouched = SamplingParams(), SamplingParams(logit_bias={3: 50.0})
    assert choose(LOGITS.expand(2, -1), untouched, [random.Random(0)] * 2, [[], []]) == [0, 3]
    assert LOGITS.tolist() == [2.0, 1.0, 0.5, 0.0, -1.0]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias: of token 3"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0; 0 needs prompt_logprobs"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "max_tokens"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_parameters_out_of_range_are_named(fields, name):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**fields)
