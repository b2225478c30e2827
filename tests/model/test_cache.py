"""Caches: at once, token by token, in chunks, in a batch, padded on either side: the same logits and depths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import MoRCache, kv_bytes
from model.depth import stages_of
from model.flops import capacities
from model.memory import kv_cache_bytes_per_token
from tests.helpers.tiny import VOCABULARY, tiny_config, tiny_model
from tests.helpers.variants import GENERATING

LOGITS = {"rtol": 1e-5, "atol": 1e-6}  # router scores are fp32 in a model that is fp64 elsewhere
LAW = settings(deadline=None, max_examples=2, derandomize=True)
variants = pytest.mark.parametrize("variant", GENERATING)


def random_ids(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_chunks(model, ids, sizes, mask=None) -> tuple[torch.Tensor, torch.Tensor, MoRCache]:
    """Logits and depths of a cached pass over chunks of the given sizes."""
    cache = MoRCache(model.config)
    logits, depths, done = [], [], 0
    for size in sizes:
        end = done + size
        given = None if mask is None else mask[:, :end]
        out = model(ids[:, done:end], attention_mask=given, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
        depths.append(out.routing.depth if out.routing is not None else torch.zeros_like(ids[:, done:end]))
        done = end
    return torch.cat(logits, 1), torch.cat(depths, 1), cache


@torch.no_grad()
def at_once(model, ids, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(ids, attention_mask=mask)
    return out.logits, out.routing.depth if out.routing is not None else torch.zeros_like(ids)


def cut(length: int, seed: int) -> list[int]:
    """A random partition of `length`."""
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))[: seed % length] + 1
    edges = [0, *sorted(cuts.tolist()), length]
    return [b - a for a, b in pairwise(edges)]


@variants
@LAW
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), length=st.integers(2, 10))
def test_cached_equals_uncached_token_by_token_and_in_any_chunks(variant, seed, batch, length):
    model, ids = tiny_model(variant, seed % 5), random_ids(seed, batch, length)
    logits, depth = at_once(model, ids)
    for sizes in ([1] * length, cut(length, seed)):
        cached, cached_depth, _ = in_chunks(model, ids, sizes)
        torch.testing.assert_close(cached, logits, **LOGITS)
        assert torch.equal(cached_depth, depth)


@variants
@LAW
@given(seed=st.integers(0, 10**6), short=st.integers(1, 7), long=st.integers(7, 10), left=st.booleans())
def test_padding_and_company_change_nothing(variant, seed, short, long, left):
    model = tiny_model(variant, seed % 5)
    rows = [random_ids(seed, 1, short), random_ids(seed + 1, 1, long)]
    ids, mask = torch.zeros(2, long, dtype=torch.long), torch.zeros(2, long, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(long - row.shape[1], long) if left else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    cached, depth, _ = in_chunks(model, ids, cut(long, seed), mask)
    for i, row in enumerate(rows):
        alone, alone_depth = at_once(model, row)
        real = mask[i].bool()
        torch.testing.assert_close(cached[i, real], alone[0], **LOGITS)
        assert torch.equal(depth[i, real], alone_depth[0])


@pytest.mark.parametrize("variant", [name for name in GENERATING if name.startswith(("expert", "token"))])
def test_depths_vary_so_that_the_laws_mean_something(variant):
    model = tiny_model(variant, 1)
    depth = at_once(model, random_ids(1, 2, 40))[1]
    assert len(depth.unique()) >= 2


@variants
def test_memory_is_what_was_entered(variant):
    """One row: exactly the tokens that entered each recursion, and nothing for those that did not."""
    model, ids = tiny_model(variant, 3), random_ids(3, 1, 23)
    _, _, cache = in_chunks(model, ids, cut(23, 12345))
    config = model.config
    with torch.no_grad():
        routed = model(ids).routing
    entered = [0] if routed is None else routed.entered[0].tolist()
    assert cache.memory_bytes() == kv_bytes(config, entered, 23, bytes_per_value=8)
    uses = [(stage.gate, use) for stage in stages_of(config) for use in stage.uses if use.keys != "none"]
    ragged = [use.keys == "entered" and gate is not None for gate, use in uses]
    by_hand = sum(entered[gate or 0] if own else 23 for (gate, _), own in zip(uses, ragged, strict=True))
    assert cache.memory_bytes() == by_hand * 2 * 2 * 8 * 8
    if any(ragged) and min(entered) < 23:  # of ACT, all enter a step, or none
        assert by_hand < 23 * config.num_hidden_layers


@variants
def test_expected_memory_is_the_accountants(variant):
    config = tiny_config(variant)
    tokens = 60  # divides by every capacity of the variants
    entered = [int(tokens * share) for share in capacities(config)]
    held = kv_bytes(config, entered, tokens, bytes_per_value=2)
    assert held == pytest.approx(tokens * kv_cache_bytes_per_token(config, bytes_per_value=2), rel=1e-9)


@variants
def test_rows_can_be_reordered_repeated_and_cropped(variant):
    model, ids = tiny_model(variant, 2), random_ids(2, 3, 12)
    order = torch.tensor([2, 0, 0, 1])
    _, _, cache = in_chunks(model, ids[:, :9], [5, 4])
    cache.crop(-2)
    cache.reorder_cache(order)
    with torch.no_grad():
        out = model(ids[order, 7:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits, at_once(model, ids[order])[0][:, 7:], **LOGITS)
    assert cache.get_seq_length() == 12
    cache.reset()
    assert cache.get_seq_length() == cache.memory_bytes() == 0
    torch.testing.assert_close(in_chunks(model, ids, [12])[0], at_once(model, ids)[0], **LOGITS)


@pytest.mark.parametrize("variant", ["expert-recursion_wise", "token-shared_update", "expert-shared"])
def test_agreement_holds_after_training_in_fp32(variant):
    model = tiny_model(variant, 4).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(8):
        ids = random_ids(step, 4, 24)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    ids = random_ids(99, 2, 30)
    logits, depth = at_once(model, ids)
    cached, cached_depth, _ = in_chunks(model, ids, [7, 1, 1, 12, 9])
    assert torch.equal(cached_depth, depth)
    torch.testing.assert_close(cached, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached.argmax(-1), logits.argmax(-1))


def test_what_cannot_be_cached_is_refused():
    model, ids = tiny_model("expert-recursion_wise"), random_ids(0, 2, 6)
    with pytest.raises(ValueError, match=r"routing_mode.*causal"):
        model(ids, use_cache=True, routing_mode="topk")
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, use_cache=True, document_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="MoRCache"):
        model(ids, past_key_values=object())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch of 2"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert model(ids).past_key_values is None


@pytest.mark.parametrize("variant", ["token-propagated", "ut-frozen"])
def test_a_token_that_stops_alone_keeps_its_state_for_the_others(variant):
    """Where nobody runs a stage, whose keys are of everyone, a token stands in: it must not pass for a passed one."""
    model, ids = tiny_model(variant), random_ids(3, 1, 10)
    (logits, depths), (alone, depths_alone, _) = at_once(model, ids), in_chunks(model, ids, [1] * 10)
    assert depths.min() < model.config.num_recursions and torch.equal(depths, depths_alone)
    torch.testing.assert_close(alone, logits, **LOGITS)
