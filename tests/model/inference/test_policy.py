"""Depth by request: policies beside each other in one batch, rising depth, what gates scored, what an answer cost."""

from __future__ import annotations

import math

import pytest
import torch

from model.flops import forward_flops, linear_flops, work_of
from model.inference.cost import Prices
from model.inference.engine import Engine
from model.inference.policy import DepthPolicy
from model.inference.sampling import SamplingParams
from tests.helpers.tiny import tiny_model
from tests.helpers.variants import GENERATING
from tests.model.inference.test_engine import CROWDED, assert_empty, random_prompts

LOOPED = ["recursive", "expert-recursion_wise", "expert-shared", "token-shared", "ut-frozen"]
LOOPED = [name for name in LOOPED if name in GENERATING]
ROUTED = [name for name in LOOPED if not name.startswith("recursive")]


@pytest.mark.parametrize("variant", LOOPED)
def test_requests_of_several_policies_share_a_batch(variant):
    """Each gets what an engine of its policy alone gives it."""
    model, prompts = tiny_model(variant, 1), random_prompts(6, 3)
    policies = [None, *map(DepthPolicy.parse, ("cap:1", "cap:2", "uniform:3", "uniform:2", "adaptive"))]
    crowd = Engine(model, **(CROWDED | {"kv_tokens": 160}))
    together = [crowd.submit(p, SamplingParams(max_tokens=6, depth=d)) for p, d in zip(prompts, policies)]
    list(crowd.stream())
    assert_empty(crowd)
    for prompt, policy, request in zip(prompts, policies, together):
        alone = Engine(model, depth=policy).generate([prompt], SamplingParams(max_tokens=6))[0]
        assert (request.tokens, request.depths) == (alone.tokens, alone.depths), policy


@pytest.mark.parametrize("variant", [name for name in ROUTED if not name.startswith("ut")])
def test_progressive_depth_is_a_pass_whose_gates_go_by_position(variant, monkeypatch):
    model, prompt = tiny_model(variant, 1), random_prompts(1, 4)[0][:14]
    params = SamplingParams(max_tokens=10, depth=DepthPolicy.parse("progressive:1-3"))
    request = Engine(model, **CROWDED).generate([prompt], params)[0]
    length = len(prompt) + 10
    depths = [1 + 3 * place // length for place in range(length)]
    assert request.depths == depths[: len(request.depths)] and set(depths) == {1, 2, 3}
    method, begin = model.model.depth, model.model.depth.begin
    wanted = torch.tensor([depths[: len(request.text) - 1]])

    if hasattr(method, "choose"):
        monkeypatch.setattr(method, "choose", lambda scores, step: wanted - 1)
    else:
        monkeypatch.setattr(method, "begin", lambda x, run: begin(x, run) | {"wanted": wanted})
        monkeypatch.setattr(method, "admit", lambda gate, logits, x, carry, run: carry["wanted"] > gate)
    with torch.no_grad():
        output = model(torch.tensor([request.text[:-1]]))
    assert output.routing.depth[0].tolist() == request.depths
    greedy = output.logits[0].argmax(-1).tolist()
    assert greedy[len(prompt) - 1 :] == request.tokens


def test_progressive_without_a_rise_is_uniform():
    prompt = random_prompts(1, 6)[0]
    for variant in ROUTED:
        model = tiny_model(variant, 1)
        one, other = (
            Engine(model, depth=DepthPolicy.parse(text)).generate([prompt], SamplingParams(max_tokens=6))[0]
            for text in ("progressive:2-2", "uniform:2")
        )
        assert (one.tokens, one.depths) == (other.tokens, other.depths), variant


def test_a_request_goes_no_deeper_than_its_engine():
    model, prompt = tiny_model("expert-recursion_wise", 1), random_prompts(1, 2)[0]
    engine = Engine(model, depth=DepthPolicy.parse("cap:2"))
    with pytest.raises(ValueError, match="depth: uniform:3 does not fit 1 to 2"):
        engine.submit(prompt, SamplingParams(depth=DepthPolicy.parse("uniform:3")))
    by_layer = Engine(tiny_model("recursive-shared", 1, sharing="middle_sequence"))
    with pytest.raises(ValueError, match="repeats layer by layer"):
        by_layer.submit(prompt, SamplingParams(depth=DepthPolicy.parse("cap:2")))
    free = engine.generate([prompt], SamplingParams(max_tokens=4, depth=DepthPolicy()))[0]
    assert free.depths == engine.generate([prompt], SamplingParams(max_tokens=4))[0].depths and max(free.depths) == 2


@pytest.mark.parametrize("variant", GENERATING)
def test_an_answer_costs_what_the_model_counts_for_it(variant):
    """Sent back on the way or not; read out at every position, as a whole pass is."""
    model, prompts = tiny_model(variant, 1), random_prompts(3, 3)
    engine, config, prices = Engine(model, **CROWDED), model.config, Prices(model.config)
    for request in engine.generate(prompts, SamplingParams(max_tokens=6, gates=True)):
        ids = torch.tensor([request.text[:-1]])
        with torch.no_grad():
            record = model(ids, prompt_length=len(request.prompt)).routing
        counted = (
            () if record is None else [part.sum(0).tolist() for part in (record.counts, record.pairs, record.offered)]
        )
        work = work_of(config, ids.shape[1], 1, *(counted or ((), ())), heads=0)
        expected = round(sum(forward_flops(config, work).values()))
        early = 0 if record is None else record.heads
        expected += linear_flops(early, config.hidden_size, config.vocab_size)
        assert prices.spent(request.passed, request.judged, ids.shape[1] + early) == expected
        assert sum(request.heads) == early
        took, whole = prices.of_request(request)
        assert 0 < took <= whole or early
        if record is not None and len(record.scores) == len(request.gates[0]):
            seen = sum(not math.isnan(value) for scores in request.gates for value in scores)
            assert seen == int(record.offered.sum())


@pytest.mark.parametrize("variant", LOOPED)
def test_a_cap_costs_less(variant):
    model, prompt = tiny_model(variant, 1), random_prompts(1, 3)[0]
    costs = []
    for text in ("cap:1", "cap:2", "uniform:3"):
        params = SamplingParams(max_tokens=4, depth=DepthPolicy.parse(text))
        costs.append(Prices(model.config).of_request(Engine(model).generate([prompt], params)[0]))
    assert costs[0][0] < costs[1][0] < costs[2][0] <= costs[2][1]
    assert costs[0][1] == costs[1][1] == costs[2][1]
