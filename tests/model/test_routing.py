"""The equations of routing, each on its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MoRConfig
from model.depth import capacity, routers, stages_of, token_choice
from model.record import entropy, make_record, max_violation


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), share=st.floats(0.05, 1.0), later=st.floats(0.05, 1.0)
)
def test_capacity_is_shared_out_by_length_alone(lengths, share, later):
    """Quotas sum to the capacity, never exceed what a document offers, and nest over recursions."""
    for taken in (share, share * later):
        total = sum(lengths)
        size = max(1, int(taken * total))
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        quota, first = capacity.document_quota(documents, size, total)
        places = [sum(lengths[:i]) for i in range(len(lengths))]
        quotas = quota[0, places].tolist()
        assert sum(quotas) == size
        assert all(0 <= q <= length for q, length in zip(quotas, lengths, strict=True))
        assert first[0, places].tolist() == places
        chosen = capacity.selected_mask(torch.randn(1, total), documents, None, size)
        assert [int(part.sum()) for part in chosen[0].split(lengths)] == quotas
        lengths = [q for q in quotas if q]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20))
def test_selection_takes_the_best(seed, length, size):
    size = min(size, length)
    logits = torch.randn(3, length, generator=torch.Generator().manual_seed(seed))
    chosen = capacity.selected_mask(logits, None, None, size)
    assert chosen.sum(1).tolist() == [size] * 3
    for row, mask in zip(logits, chosen, strict=True):
        assert size == length or row[mask].min() >= row[~mask].max()
    slots = capacity.slots_of(chosen, None, size)
    assert torch.equal(slots, torch.stack([mask.nonzero().squeeze(1) for mask in chosen]))


def test_ties_go_to_the_earlier_token():
    chosen = capacity.selected_mask(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), None, None, 2)
    assert chosen.tolist() == [[True, True, False, False]]


def test_padding_is_never_selected():
    used = torch.tensor([[True, True, True, False, False]])
    logits = torch.tensor([[0.0, 3.0, 1.0, 9.0, 9.0]])
    chosen = capacity.selected_mask(logits, None, used, torch.tensor([[2]]))
    assert chosen.tolist() == [[False, True, True, False, False]]
    assert capacity.slots_of(chosen, used, 4).tolist() == [[1, 2, 3, 4]]


def test_capacity_warm_up_falls_from_one():
    values = [capacity.factor_at(0.25, step, 10) for step in range(12)]
    assert values[0] == 1.0 and values[5] == pytest.approx(0.625) and values[10] == values[11] == 0.25
    assert values == sorted(values, reverse=True)
    assert capacity.factor_at(0.25, None, 10) == 0.25 and capacity.selection_size(0.01, 10) == 1


def test_gates():
    logits = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.allclose(routers.gate_of(logits, "sigmoid", 0.1), 0.1 / (1 + torch.exp(-logits)))
    assert torch.allclose(routers.gate_of(logits, "tanh", 0.5), 0.5 * torch.tanh(logits))
    assert torch.equal(routers.gate_of(logits, "none", 0.1), logits)
    scores = token_choice.depth_scores(torch.tensor([[0.0, math.log(3.0)]]), "softmax", 2.0)
    assert torch.allclose(scores, torch.tensor([[0.5, 1.5]]))


def test_balancing():
    load, scores = torch.tensor([0.5, 0.5]), torch.tensor([[[0.25, 0.75], [0.75, 0.25]]])
    assert token_choice.balancing_loss(load, scores, None).item() == pytest.approx(1.0)
    masked = token_choice.balancing_loss(torch.tensor([1.0, 0.0]), scores, torch.tensor([[True, False]]))
    assert masked.item() == pytest.approx(0.5)
    bias = token_choice.bias_step(torch.zeros(3), torch.tensor([0.5, 0.3, 0.2]), 0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.01, 0.01])
    assert max_violation(torch.tensor([0.5, 0.25, 0.25])).item() == pytest.approx(0.5)
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4))


def test_losses_leave_padding_out():
    logits, used = torch.tensor([[0.0, 5.0]]), torch.tensor([[True, False]])
    selected = torch.tensor([[True, False]])
    assert capacity.selection_loss(logits, selected, used).item() == pytest.approx(math.log(2))
    assert routers.z_loss(logits[..., None], None).item() == pytest.approx(12.5)
    assert routers.z_loss(logits[..., None], used).item() == 0.0


def test_router_scores_stay_fp32_in_bf16():
    """In bf16 the scores of 2,048 tokens would take a handful of values."""
    torch.manual_seed(0)
    router = routers.Router(MoRConfig(hidden_size=60, num_attention_heads=15), 1)
    torch.nn.init.normal_(router.weight, std=0.02)
    x = torch.randn(2048, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(x)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 2000
    assert router.to(torch.bfloat16)(x.bfloat16()).dtype == torch.float32


def test_random_control_is_uniform_and_keeps_to_its_token():
    ids = torch.randint(0, 1000, (4, 512), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(512)[None]
    logits = routers.random_logits(ids, positions, 0, 3)
    uniform = torch.sigmoid(logits)
    assert logits.shape == (4, 512, 3)
    assert abs(uniform.mean().item() - 0.5) < 0.02 and abs(uniform.std().item() - 12**-0.5) < 0.02
    assert torch.equal(routers.random_logits(ids[:1, 100:200], positions[:, 100:200], 0, 3), logits[:1, 100:200])
    assert not torch.equal(routers.random_logits(ids, positions, 1, 3), logits)
    correlation = torch.corrcoef(uniform.flatten(0, 1).T)
    assert (correlation - torch.eye(3)).abs().max() < 0.1


def test_record_counts_queries_and_pairs():
    depth = torch.tensor([[1, 3, 2, 0], [2, 1, 1, 3]])
    used = torch.tensor([[True, True, True, False], [True] * 4])
    entered = depth[..., None] >= torch.arange(1, 4)

    def record_of(**fields):
        layout = stages_of(MoRConfig(num_recursions=3, routing="token_choice", **fields))
        return make_record(entered, entered, used, layout)

    record = record_of()
    assert torch.equal(record.depth, depth)
    assert record.counts.tolist() == [[3, 2, 1], [4, 2, 1]]
    assert record.pairs.tolist() == [[6, 3, 1], [10, 3, 1]]
    assert record.load.tolist() == pytest.approx([7 / 7, 4 / 7, 2 / 7])
    assert record.statistics["dead_token_share"].item() == pytest.approx(0.5)
    assert record_of(kv_strategy="shared").pairs.tolist() == [[6, 5, 2], [10, 5, 4]]
