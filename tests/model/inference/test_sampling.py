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
