"""The engine against decoding one request at a time: the same tokens and depths, whatever else is in the batch."""

from __future__ import annotations

import gc
import random
from itertools import chain

import psutil
import pytest
import torch

from model.inference.engine import Engine, pageable
from model.inference.policy import DepthPolicy
from model.inference.sampling import SamplingParams
from model.inference.scheduler import QueueFull, Request
from tests.helpers.tiny import VOCABULARY, tiny_config, tiny_model
from tests.helpers.variants import GENERATING

CROWDED = {"max_batch": 6, "kv_tokens": 90, "page_size": 4, "prefill_tokens": 7}


def random_prompts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def alone(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding of one prompt by transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def assert_empty(engine: Engine) -> None:
    """Nothing in flight, every page back, none handed out twice."""
    assert engine.idle and not engine.flights
    for pool in (engine.everyone, engine.recursed):
        assert pool.free_pages() == pool.pages and not pool.runs


@pytest.mark.parametrize("variant", GENERATING)
def test_a_crowded_engine_yields_what_decoding_alone_yields(variant):
    """Prompts in chunks, decoding beside them, more requests than slots, a pool that runs out."""
    model, prompts = tiny_model(variant, 1), random_prompts(5, 3)
    engine = Engine(model, **CROWDED)
    requests = engine.generate(prompts, SamplingParams(max_tokens=6))
    for prompt, request in zip(prompts, requests):
        assert request.tokens == alone(model, prompt, 6)
        assert request.finished == "length"
        with torch.no_grad():
            routed = model(torch.tensor([request.text[:-1]]), prompt_length=len(prompt)).routing
        assert routed is None or routed.depth[0].tolist() == request.depths
    assert_empty(engine)


@pytest.mark.parametrize("variant", [name for name in GENERATING if pageable(tiny_config(name))])
def test_pages_that_lie_anywhere_change_nothing(variant):
    model, prompts = tiny_model(variant, 1), random_prompts(7, 4)
    params = SamplingParams(max_tokens=6, gates=True)
    engine, whole = Engine(model, **CROWDED, paged=True), Engine(model, **CROWDED)
    for one, other in zip(engine.generate(prompts, params), whole.generate(prompts, params), strict=True):
        assert (one.tokens, one.depths, one.heads) == (other.tokens, other.depths, other.heads)
        assert (one.passed, one.judged) == (other.passed, other.judged)
        torch.testing.assert_close(torch.tensor(one.gates), torch.tensor(other.gates), equal_nan=True)
    assert engine.everyone.moves == 0
    assert_empty(engine)


def test_pages_that_lie_anywhere_see_requests_sent_back_cancelled_sampled_and_of_other_depths():
    """In both pools the same texts, though other requests are sent back; a depth of its own is left to the host."""
    model, prompts = tiny_model("expert-recursion_wise", 1), random_prompts(12, 3)
    kinds = [{}, {"temperature": 0.9, "top_k": 20, "seed": 4}, {"depth": DepthPolicy.parse("progressive:1-3")}]
    kinds += [{"logprobs": 2, "presence_penalty": 0.5}]
    texts = []
    for paged in (True, False):
        engine = Engine(model, **CROWDED, paged=paged)
        requests = [engine.submit(p, SamplingParams(16, **kinds[i % 4])) for i, p in enumerate(prompts)]
        for _ in range(9):
            engine.step()
        engine.cancel(requests[2])
        list(engine.stream())
        assert requests[2].finished == "cancelled" and engine.statistics.preemptions > 0
        assert_empty(engine)
        texts.append([(r.tokens, r.depths, [r.scores[i].top for i in sorted(r.scores)]) for r in requests[3:]])
    for one, other in zip(*texts, strict=True):
        assert one[:2] == other[:2]
        for top, expected in zip(one[2], other[2], strict=True):
            assert [token for token, _ in top] == [token for token, _ in expected]
            assert [value for _, value in top] == pytest.approx([value for _, value in expected])


def test_a_decoding_step_with_block_tables_reads_once_from_the_device(monkeypatch):
    """What forbids a graph: a value that the host asks for. Requests without a wish of their own need none."""
    engine = Engine(tiny_model("expert-recursion_wise", 1), max_batch=4, kv_tokens=400, paged=True)
    requests = [engine.submit([i + 1], SamplingParams(max_tokens=20)) for i in range(3)]
    for _ in range(3):
        engine.step()
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"the host asked: {name}"))
    for _ in range(6):
        engine.step()
    monkeypatch.undo()
    list(engine.stream())
    for request in requests:
        assert request.tokens == alone(engine.model, request.prompt, 20)


def test_keys_laid_over_others_have_no_block_tables():
    with pytest.raises(ValueError, match="paged: kv_strategy shared_update"):
        Engine(tiny_model("expert-shared_update"), paged=True)


def test_the_crowd_is_real():
    """The setting above does send requests back, move runs, mix recursions in one call and cut prompts."""
    engine = Engine(tiny_model("expert-recursion_wise", 1), **CROWDED)
    mixed = 0
    for prompt in random_prompts(12, 3):
        engine.submit(prompt, SamplingParams(max_tokens=24))
    while not engine.idle:
        engine.step()
        mixed += len({flight.at for flight in engine.flights}) > 1
    assert engine.statistics.preemptions > 0 and mixed > 10
    assert engine.everyone.moves > 0 and engine.recursed.moves > 0
    assert_empty(engine)


def test_decoding_goes_on_while_a_long_prompt_is_taken_in():
    engine = Engine(tiny_model("expert-shared", 2), max_batch=4, kv_tokens=800, prefill_tokens=8)
    short = engine.submit([5, 6], SamplingParams(max_tokens=60))
    for _ in range(6):
        engine.step()
    long = engine.submit(random_prompts(1, 1, 200)[0] * 3, SamplingParams(max_tokens=2))
    before, steps = len(short.tokens), 0
    while not long.tokens:
        engine.step()
        steps += 1
    assert steps >= len(long.prompt) // 8
    assert len(short.tokens) - before >= min(steps // 3, 60 - before)  # a token takes at most three steps


def test_sampling_depends_on_the_request_alone():
    model, prompts = tiny_model("token-recursion_wise", 2), random_prompts(6, 5)
    options = {"max_tokens": 10, "temperature": 0.9, "top_p": 0.9, "top_k": 20}
    params = [SamplingParams(**options, seed=i) for i in range(6)]
    crowd = Engine(model, **CROWDED)
    together = [crowd.submit(prompt, p) for prompt, p in zip(prompts, params)]
    list(crowd.stream())
    for prompt, p, request in zip(prompts, params, together):
        assert Engine(model).generate([prompt], p)[0].tokens == request.tokens
    other = Engine(model).generate([prompts[0]] * 2, SamplingParams(**options, seed=99))
    assert other[0].tokens == other[1].tokens != together[0].tokens


def test_cancelled_requests_leave_no_trace_in_the_others():
    model, prompts = tiny_model("expert-recursion_wise", 3), random_prompts(10, 7)
    engine, rng = Engine(model, **CROWDED), random.Random(1)
    requests = [engine.submit(prompt, SamplingParams(max_tokens=8)) for prompt in prompts]
    while not engine.idle:
        engine.step()
        if rng.random() < 0.15:
            engine.cancel(rng.choice(requests))
    assert any(r.finished == "cancelled" for r in requests) and any(r.finished == "length" for r in requests)
    for prompt, request in zip(prompts, requests):
        assert request.tokens == alone(model, prompt, 8)[: len(request.tokens)]
        assert request.finished == "cancelled" or len(request.tokens) == 8
    assert_empty(engine)


def streamed(engine: Engine, request: Request) -> tuple[list[list[int]], str]:
    events = [event for event in engine.stream() if event.request is request]
    return [event.tokens for event in events], events[-1].finished


def test_stop_sequences_end_the_text_and_are_never_handed_out():
    model, prompt = tiny_model("vanilla", 4), [3, 1, 4]
    tokens = alone(model, prompt, 12)
    stop = tokens[5:8]
    cut = next(i for i in range(12) if tokens[i : i + 3] == stop)
    engine = Engine(model)
    request = engine.submit(prompt, SamplingParams(max_tokens=12, stop=[[VOCABULARY - 1] * 9, stop]))
    pieces, reason = streamed(engine, request)
    assert (list(chain(*pieces)), reason) == (tokens[:cut], "stop") == (request.tokens, request.finished)
    near = [*tokens[3:5], (tokens[5] + 1) % VOCABULARY]
    request = engine.submit(prompt, SamplingParams(max_tokens=12, stop=[near]))
    pieces, reason = streamed(engine, request)
    assert (list(chain(*pieces)), reason) == (tokens, "length")


def test_depth_policies():
    model, prompt = tiny_model("expert-recursion_wise", 1), random_prompts(1, 2, 30)[0]
    depths = {}
    for text in ("adaptive", "uniform:3", "uniform:1", "cap:2", "cap:1"):
        engine = Engine(model, depth=DepthPolicy.parse(text))
        depths[text] = engine.generate([prompt], SamplingParams(max_tokens=1))[0].depths
    assert set(depths["uniform:3"]) == {3} and set(depths["uniform:1"]) == set(depths["cap:1"]) == {1}
    assert len(set(depths["adaptive"])) > 1 and max(depths["cap:2"]) == 2
    full = Engine(tiny_model("recursive", 1)).generate([prompt], SamplingParams(max_tokens=6))[0]
    same = Engine(tiny_model("recursive", 1), depth=DepthPolicy("uniform", 3)).generate([prompt], full.params)[0]
    assert full.tokens == same.tokens
    token = Engine(tiny_model("token-shared", 1), depth=DepthPolicy("uniform", 2))
    assert set(token.generate([prompt], SamplingParams(max_tokens=1))[0].depths) == {2}


@pytest.mark.parametrize("variant", ["recursive-shared", "expert-aux-shared_update", "token-recursion_wise"])
def test_a_cap_is_a_pass_with_at_most_as_many_recursions(variant):
    model, prompt = tiny_model(variant, 1), random_prompts(1, 4)[0]
    request = Engine(model, depth=DepthPolicy("cap", 2)).generate([prompt], SamplingParams(max_tokens=5))[0]
    with torch.no_grad():
        out = model(torch.tensor([request.text[:-1]]), max_recursions=2)
    assert out.logits[0, len(prompt) - 1 :].argmax(-1).tolist() == request.tokens
    assert out.routing is None or out.routing.depth[0].tolist() == request.depths


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        ("deep", "recursive", "expected adaptive, uniform:N, cap:N, progressive:A-B"),
        ("uniform:", "recursive", "expected adaptive"),
        ("cap:4", "recursive", "does not fit 1 to 3"),
        ("uniform:0", "expert-shared", "does not fit"),
        ("progressive:2-4", "expert-shared", "does not fit 1 to 3"),
        ("progressive:3-2", "token-shared", "does not fit"),
        ("progressive:1-3", "recursive", "use cap:N"),
    ],
)
def test_impossible_depths_are_refused(text, variant, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model(variant), depth=DepthPolicy.parse(text))


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([], {}, "prompt: empty"),
        ([1] * 257, {}, "no room in the context of 256"),
        ([1, VOCABULARY], {}, f"{VOCABULARY} is outside the vocabulary"),
        ([-1], {}, "-1 is outside"),
        ([1.5], {}, "outside"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": 200}, "more keys and values than the engine holds"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.1}, "top_p"),
        ([1], {"stop": [[]]}, "stop"),
    ],
)
def test_bad_requests_are_refused_by_name_and_hurt_nobody(prompt, fields, message):
    engine = Engine(tiny_model("vanilla"), kv_tokens=100)
    good = engine.submit([1, 2], SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**fields))
    list(engine.stream())
    assert len(good.tokens) == 3
    assert_empty(engine)


def test_more_requests_than_may_wait_are_refused_until_some_are_done():
    engine = Engine(tiny_model("vanilla"), max_batch=1, max_waiting=2)
    for _ in range(2):
        engine.submit([1], SamplingParams(max_tokens=1))
    with pytest.raises(QueueFull):
        engine.submit([1])
    engine.step()
    assert engine.submit([1], SamplingParams(max_tokens=1)).finished == ""
    list(engine.stream())
    assert_empty(engine)


def test_a_model_that_cannot_decide_causally_is_refused():
    with pytest.raises(ValueError, match="routing_mode"):
        Engine(tiny_model("expert-shared", selection="none"))


def test_the_context_ends_a_request():
    engine = Engine(tiny_model("vanilla"), kv_tokens=400)
    request = engine.generate([[1] * 250], SamplingParams(max_tokens=100))[0]
    assert (len(request.text), request.finished) == (256, "length")


def test_the_pool_is_as_large_as_computed_and_never_grows():
    engine = Engine(tiny_model("expert-recursion_wise"), kv_tokens=320, page_size=16)
    config, value = engine.config, 8
    per_token = 2 * config.num_key_value_heads * config.head_dim * value
    # First and last layer hold 320 tokens; two shared layers hold 1 + 2/3 + 1/3 of that over the recursions.
    assert engine.kv_bytes() == (2 * 320 + 2 * 640) * per_token
    pointers = engine.everyone.keys.data_ptr(), engine.recursed.values.data_ptr()
    engine.generate(random_prompts(20, 3), SamplingParams(max_tokens=3))
    assert pointers == (engine.everyone.keys.data_ptr(), engine.recursed.values.data_ptr())
    assert_empty(engine)


@pytest.mark.slow
def test_a_thousand_mixed_requests_with_cancellations_and_preemptions(monkeypatch):
    """Greedy and sampled, of all lengths, arriving while others run, some cancelled: each as if it were alone.

    All that were cancelled and 200 of the thousand are compared, each with a run of its own.
    """
    model = tiny_model("expert-recursion_wise", 5, hidden_size=16, num_hidden_layers=5, intermediate_size=16)
    engine = Engine(model, max_batch=24, kv_tokens=300, page_size=4, prefill_tokens=48)
    single = Engine(model, max_batch=1, kv_tokens=500, page_size=16)
    rng, prompts = random.Random(11), random_prompts(1000, 13, 20)
    reserve, faults = engine.everyone.reserve, random.Random(12)
    # On top of a pool that is small, one request for pages in two hundred finds none.
    monkeypatch.setattr(engine.everyone, "reserve", lambda *wanted: faults.random() > 0.005 and reserve(*wanted))
    requests: list[Request] = []
    while len(requests) < len(prompts) or not engine.idle:
        for prompt in prompts[len(requests) : len(requests) + rng.randrange(8)]:
            temperature = rng.choice([0.0, 0.0, 0.8])
            params = SamplingParams(rng.randrange(1, 16), temperature, rng.choice([0, 10]), rng.choice([1.0, 0.9]), 7)
            requests.append(engine.submit(prompt, params))
        engine.step()
        if requests and rng.random() < 0.05:
            engine.cancel(rng.choice(requests[-60:]))
    assert_empty(engine)
    cancelled = [request for request in requests if request.finished == "cancelled"]
    assert len(cancelled) > 20 and engine.statistics.preemptions > 20
    for request in [*cancelled, *rng.sample(requests, 200)]:
        expected = single.generate([request.prompt], request.params)[0].tokens
        assert request.tokens == (expected[: len(request.tokens)] if request in cancelled else expected)


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind():
    """Short requests, some cancelled, through a pool too small for them all: what the first thousand take is enough."""
    model = tiny_model("expert-recursion_wise", 2, hidden_size=8, num_hidden_layers=5, intermediate_size=8).float()
    engine, rng, process = Engine(model, max_batch=64, kv_tokens=120, page_size=1), random.Random(3), psutil.Process()
    objects, memory = [], []
    for _ in range(20):
        lengths = [rng.randrange(1, 3) for _ in range(500)]
        requests = [engine.submit([rng.randrange(1, VOCABULARY)], SamplingParams(length)) for length in lengths]
        for request in rng.sample(requests, 20):
            engine.step()
            engine.cancel(request)
        assert sum(len(event.tokens) for event in engine.stream()) > 0
        assert all(request.finished for request in requests)
        assert_empty(engine)
        requests.clear()
        del request
        gc.collect()
        objects.append(len(gc.get_objects()))
        memory.append(process.memory_info().rss)
    assert engine.everyone.moves > 1000
    assert objects[-1] - objects[1] < 100
    assert memory[-1] - memory[1] < 16 * 2**20


def test_exits_take_another_threshold_or_are_closed():
    prompts, params = random_prompts(4, 9), SamplingParams(max_tokens=6)

    def tokens(depth: str | None, **fields) -> list[list[int]]:
        policy = None if depth is None else DepthPolicy.parse(depth)
        return [r.tokens for r in Engine(tiny_model("exit", 1, **fields), depth=policy).generate(prompts, params)]

    assert tokens("exit:0.02") == tokens(None, exit_threshold=0.02) != tokens(None)
    assert tokens("full") == tokens(None, routing_mode="full") == tokens("exit:2", routing_mode="full")
    for depth, of_prompt in (
        ("exit:0", 3),
        ("uniform:1", 0),
    ):  # prompts do not leave, but can be cut
        for request in Engine(tiny_model("exit", 1), depth=DepthPolicy.parse(depth)).generate(prompts, params):
            start = len(request.prompt)
            assert set(request.depths[start:]) == {0} and set(request.depths[:start]) == {of_prompt}
    with pytest.raises(ValueError, match="needs exits, and this is a recursive model"):
        Engine(tiny_model("recursive"), depth=DepthPolicy.parse("exit:0.5"))
    with pytest.raises(ValueError, match=r"expected adaptive.*'exit:high'"):
        DepthPolicy.parse("exit:high")
