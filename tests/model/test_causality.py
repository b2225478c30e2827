"""In causal mode nothing looks ahead; padding, packing and the rest of the batch change nothing for a token."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import MoRConfig, MoRForCausalLM
from tests.helpers import variants
from tests.helpers.variants import BY_BATCH, EXPERT, SEEING, VARIANTS

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROUTED = [name for name in SEEING if name in variants.ROUTED]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FEW = settings(deadline=None, max_examples=8)


@functools.cache
def build(name: str) -> MoRForCausalLM:
    """A model whose scores are spread out, so that every way of routing occurs."""
    torch.manual_seed(0)
    model = MoRForCausalLM(MoRConfig(**(BASE | VARIANTS[name]))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def tokens(seed: int, batch: int, length: int) -> torch.Tensor:
    """[batch, length], a token never twice in a row: in a text that begins so, both have one state but for rounding.

    Which of the two a gate takes then follows from the layout of the batch, as it may (test_equal_states.py holds
    states that are equal).
    """
    steps = torch.randint(1, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(1) % BASE["vocab_size"]


@torch.no_grad()
def logits(model: MoRForCausalLM, ids: torch.Tensor, **changes) -> torch.Tensor:
    return model(ids, use_cache=False, **changes).logits


@pytest.mark.parametrize("name", SEEING)
@FEW
@given(seed=st.integers(0, 10**6), length=st.integers(2, 24), data=st.data())
def test_later_tokens_change_nothing(name, seed, length, data):
    model, keep = build(name), data.draw(st.integers(1, length - 1))
    ids = tokens(seed, 2, length)
    changed = ids.clone()
    changed[:, keep:] = tokens(seed + 1, 2, length - keep)
    before = logits(model, ids)[:, :keep]
    torch.testing.assert_close(logits(model, changed)[:, :keep], before, **CLOSE)
    torch.testing.assert_close(logits(model, ids[:, :keep]), before, **CLOSE)


@pytest.mark.parametrize("name", [n for n in SEEING if n.startswith("expert")])
def test_the_papers_top_k_does_look_ahead(name):
    """The property above is not empty: with top-k, later tokens do change earlier predictions."""
    model, ids = build(name), tokens(3, 2, 24)
    changed = ids.clone()
    changed[:, 12:] = tokens(4, 2, 12)
    difference = logits(model, ids, routing_mode="topk") - logits(model, changed, routing_mode="topk")
    assert difference[:, :12].abs().max() > 1e-3


def test_a_tie_is_broken_alike_with_and_without_padding():
    """Without layers before the routers, equal tokens are equal states; by a plain product these two scored
    -0.13378814 and -0.13378811 on a CPU with AVX2, by the row at which they stood."""
    model, ids, length = build("expert-cycle"), tokens(40821 + 7, 3, 9), 3
    ids[2, :length] = torch.tensor([51, 43, 43])
    mask = (torch.arange(9) < torch.tensor([[1], [9], [length]])).long()
    padded = model(ids, attention_mask=mask, use_cache=False, routing_mode="topk")
    alone = model(ids[2:, :length], use_cache=False, routing_mode="topk")
    torch.testing.assert_close(padded.logits[2, :length], alone.logits[0], **CLOSE)
    assert torch.equal(padded.routing.depth[2, :length], alone.routing.depth[0])
    first = alone.routing.scores[0][0]
    assert torch.equal(first[1], first[2]) and torch.equal(padded.routing.scores[0][2, :length], first)


@pytest.mark.parametrize("mode", ["causal", "topk", "train"])
@pytest.mark.parametrize("name", SEEING)
@FEW
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), data=st.data())
def test_padding_changes_nothing(name, mode, seed, lengths, data):
    """Rows of any length, padded left or right, equal the same rows alone."""
    model = build(name)
    longest = max(lengths)
    ids, mask = tokens(seed + 7, len(lengths), longest), torch.zeros(len(lengths), longest, dtype=torch.long)
    places = []
    for row, length in enumerate(lengths):
        start = data.draw(st.sampled_from([0, longest - length]))
        places.append(slice(start, start + length))
        mask[row, places[-1]] = 1
    changes = {} if mode == "train" else {"routing_mode": mode}
    model.train(mode == "train")
    try:
        padded = model(ids, attention_mask=mask, use_cache=False, **changes)
        for row, place in enumerate(places):
            alone = model(ids[row : row + 1, place], use_cache=False, **changes)
            torch.testing.assert_close(padded.logits[row, place], alone.logits[0], **CLOSE)
            if alone.routing is not None:
                assert torch.equal(padded.routing.depth[row, place], alone.routing.depth[0])
                if name in BY_BATCH:
                    assert (padded.routing.counts[row] >= alone.routing.counts[0]).all()
                else:
                    assert torch.equal(padded.routing.counts[row], alone.routing.counts[0])
                    assert torch.equal(padded.routing.pairs[row], alone.routing.pairs[0])
                assert padded.routing.depth[row].sum() == alone.routing.depth.sum()
    finally:
        model.eval()


@pytest.mark.parametrize("name", SEEING)
@FEW
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_documents_in_one_row_do_not_see_each_other(name, seed, lengths):
    """Causal mode: each document of a packed row equals the same document alone, at the same positions."""
    model, total = build(name), sum(lengths)
    ids = tokens(seed, 1, total)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed, start = logits(model, ids, document_ids=documents), 0
    for length in lengths:
        place = slice(start, start + length)
        positions = torch.arange(start, start + length)[None]
        alone = logits(model, ids[:, place], position_ids=positions)
        torch.testing.assert_close(packed[:, place], alone, **CLOSE)
        start += length


@pytest.mark.parametrize("mode", ["topk", "train"])
@pytest.mark.parametrize("name", ROUTED)
@FEW
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4), data=st.data())
def test_documents_compete_for_slots_among_themselves(name, mode, seed, lengths, data):
    """Top-k: changing one document changes neither the selection nor the predictions of the others."""
    model, total, other = build(name), sum(lengths), data.draw(st.integers(0, len(lengths) - 1))
    ids = tokens(seed, 1, total)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    elsewhere = documents != other
    changed = torch.where(elsewhere, ids, tokens(seed + 1, 1, total))
    model.train(mode == "train")
    try:
        first = model(ids, document_ids=documents, routing_mode="topk", use_cache=False)
        second = model(changed, document_ids=documents, routing_mode="topk", use_cache=False)
    finally:
        model.eval()
    torch.testing.assert_close(first.logits[elsewhere], second.logits[elsewhere], **CLOSE)
    assert torch.equal(first.routing.depth[elsewhere], second.routing.depth[elsewhere])
    if name.startswith("expert"):
        assert torch.equal(first.routing.counts, second.routing.counts)


@pytest.mark.parametrize(
    "name", ["expert-recursion_wise", "expert-shared-falling", "token-recursion_wise", "token-free-update"]
)
def test_documents_and_padding_together(name):
    """A packed row with padding on the left, its documents equal to themselves in an unpadded row."""
    model, ids = build(name), tokens(5, 1, 20)
    documents = (torch.arange(20) // 7)[None]
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)], 1)
    padded_ids = torch.cat([tokens(6, 1, 4), ids], 1)
    padded_documents = torch.cat([torch.zeros(1, 4, dtype=torch.long), documents], 1)
    for mode in ("causal", "topk"):
        plain = logits(model, ids, document_ids=documents, routing_mode=mode)
        padded = logits(model, padded_ids, document_ids=padded_documents, attention_mask=mask, routing_mode=mode)
        torch.testing.assert_close(padded[:, 4:], plain, **CLOSE)


def test_causal_mode_needs_a_trained_decision():
    model = MoRForCausalLM(MoRConfig(**(BASE | EXPERT | {"selection": "none"}))).eval()
    with pytest.raises(ValueError, match="routing_mode: 'causal' needs a router that was trained"):
        logits(model, tokens(0, 1, 8))
    assert logits(model, tokens(0, 1, 8), routing_mode="topk").shape == (1, 8, 61)
