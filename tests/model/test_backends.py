"""Every backend of attention against attention written out, on a CPU; kernels of GPUs are stood in for by slow ones.

What is held is how each backend derives its own form of who sees whom: cumulative lengths, blocks, masks.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import MoRForCausalLM, decoder
from model.attention import BACKENDS, only, see
from model.attention import flex as flex_module
from model.attention import varlen as varlen_module
from model.attention.visible import Rows, Visible, rung
from tests.helpers.tiny import VOCABULARY, tiny_config

CPU = torch.device("cpu")


def segments(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """What the kernel of varlen computes, one segment after the other."""
    parts = []
    for start, end in zip(lengths.tolist(), lengths.tolist()[1:]):
        assert 0 <= end - start <= longest
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        if end > start:
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1))
    assert lengths[0] == 0 and lengths[-1] == len(query)
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def _slow_kernels(monkeypatch):
    monkeypatch.setattr(varlen_module, "kernel", segments)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    for module in (varlen_module.Varlen, flex_module.Flex):
        monkeypatch.setattr(module, "refuses", lambda self, visible, call: self.unfit(visible))


@st.composite
def cases(draw) -> Visible:
    """Rows with or without documents and padding; all positions, slots or a list; their own keys or everyone's."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = Rows(batch, length, CPU)
    if draw(st.booleans()):
        rows.documents = (torch.rand(batch, length, generator=generator) < 0.2).cumsum(1)
        rows.num_documents = draw(st.sampled_from([None, batch * length]))
    if draw(st.booleans()):
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        left = torch.rand(batch, 1, generator=generator) < 0.5
        places = torch.arange(length)
        rows.real = torch.where(left, places >= length - lengths, places < lengths)
    kind, everyone = draw(st.sampled_from(["all", "slots", "list"])), draw(st.booleans())
    chosen = torch.rand(batch, length, generator=generator) < 0.6
    if rows.real is not None:
        chosen &= rows.real
    if kind == "all":
        return Visible(rows)
    if kind == "list":
        flat = decoder._true_first(chosen.flatten(), rung(int(chosen.sum()), chosen.numel()))
        return Visible(rows, everyone, flat=flat, alive=chosen.flatten()[flat])
    if rows.real is None:  # as top-k selects: as many in every row
        slots = draw(st.integers(1, length))
        index = torch.rand(batch, length, generator=generator).argsort(1)[:, :slots].sort(1).values
        return Visible(rows, everyone, index)
    slots = int(chosen.sum(1).max().clamp(min=1))
    index = torch.sort((~chosen).long(), dim=1, stable=True).indices[:, :slots]
    return Visible(rows, everyone, index, chosen.gather(1, index))


def pairs(visible: Visible) -> tuple[list[int], list[int], Tensor]:
    """Places of queries and keys, b * T + t, and who sees whom among those that count, by the rule alone."""
    rows = visible.rows
    everything = torch.arange(rows.batch * rows.length)
    counts = torch.ones(len(everything), dtype=torch.bool)
    if visible.flat is not None:
        queries, counts = visible.flat, visible.alive
    elif visible.index is not None:
        queries = (visible.index + torch.arange(rows.batch)[:, None] * rows.length).flatten()
        counts = counts[: len(queries)] if visible.used is None else visible.used.flatten()
    else:
        queries = everything
    keys = everything if visible.everyone or not visible.selected else queries
    real = counts if keys is queries else torch.ones(len(keys), dtype=torch.bool)
    if rows.real is not None:
        real = real & rows.real.flatten()[keys]
    documents = torch.zeros(len(everything)) if rows.documents is None else rows.documents.flatten()
    same = (queries[:, None] // rows.length == keys // rows.length) & (documents[queries][:, None] == documents[keys])
    counts = counts if rows.real is None else counts & rows.real.flatten()[queries]
    return queries.tolist(), counts.nonzero().flatten().tolist(), same & (keys <= queries[:, None]) & real


def laid_out(x: Tensor, visible: Visible, of_queries: bool) -> Tensor:
    """[B * T, H, Dh] of every position -> [B, H, K, Dh] as the layers hand it over."""
    rows = visible.rows
    if not of_queries and (visible.everyone or not visible.selected):
        return x.unflatten(0, (rows.batch, -1)).transpose(1, 2)
    if visible.flat is not None:
        return x[visible.flat].transpose(0, 1)[None]
    x = x.unflatten(0, (rows.batch, -1))
    index = torch.arange(rows.length).expand(rows.batch, -1) if visible.index is None else visible.index
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:])).transpose(1, 2)


# A list of queries over the keys of several rows: the fixed draws left it out.
LIST = Visible(Rows(2, 3, CPU), True, flat=torch.tensor([0, 4]), alive=torch.tensor([True, True]))


@given(cases(), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**31))
@example(LIST, 2, 2, 0)
@settings(max_examples=80, deadline=None)
def test_every_backend_equals_attention_written_out(visible, kv_heads, group, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = visible.rows.batch * visible.rows.length
    query, key, value = (
        torch.randn(positions, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    queries, counting, seen = pairs(visible)
    keys = list(range(positions)) if visible.everyone or not visible.selected else queries
    scores = torch.einsum("qhd,khd->hqk", query[queries], key[keys].repeat_interleave(group, 1)) * 8**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, counting]
    expected = torch.einsum("hqk,khd->qhd", weights, value[keys].repeat_interleave(group, 1))
    served = set()
    for name, backend in BACKENDS.items():
        if getattr(backend, "unfit", lambda visible: None)(visible) is not None:
            continue
        tensors = (laid_out(x, visible, first) for x, first in ((query, True), (key, False), (value, False)))
        got = backend.attend(*tensors, backend.form(visible), 0.0).transpose(1, 2).flatten(0, 1)[counting]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        served.add(name)
    assert {"cpu", "explicit", "flex"} <= served
    assert ("varlen" in served) == (visible.rows.real is None and not (visible.selected and visible.everyone))


@given(cases(), st.sampled_from([4, 8]))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_every_pair_and_whole_ones_nothing_else(visible, size):
    first, last, counts = visible.bounds()
    keys = visible._keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_module, "BLOCK", size)
        mask = flex_module.block_mask(first, last, counts, keys)
    place = torch.arange(keys)
    seen = (first[:, None] <= place) & (place <= last[:, None])
    if counts is not None:
        seen = (seen & counts) | (place == last[:, None])
    assert torch.equal(mask.mask_mod(0, 0, torch.arange(len(first))[:, None], place), seen)

    def listed(number: Tensor, indices: Tensor, row: int) -> set[int]:
        return set(indices[0, 0, row, : int(number[0, 0, row])].tolist())

    for row in range(-(-len(first) // size)):
        partial = listed(mask.kv_num_blocks, mask.kv_indices, row)
        whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, row)
        assert not partial & whole
        for block in range(-(-keys // size)):
            part = seen[row * size : (row + 1) * size, block * size : (block + 1) * size]
            assert block in partial | whole or not part.any()
            assert block not in whole or part.all()


def test_the_ladder_has_few_sizes_and_holds_every_count():
    sizes = {rung(count, 32 * 4096) for count in range(0, 32 * 4096 + 1, 97)}
    assert len(sizes) <= 32 and all(size % 128 == 0 for size in sizes)
    assert all(count <= rung(count, 1000) <= min(1000, count + 128) for count in range(1, 1001))


TOKENS = torch.randint(0, VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(0))
DOCUMENTS = (torch.arange(48) // 17).expand(3, -1)


@pytest.mark.parametrize("backend", ["explicit", "varlen", "cpu"])
@pytest.mark.parametrize(
    "name",
    ["token-recursion_wise", "token-shared", "token-shared_update", "ut-frozen", "ut", "ut-basic", "expert-shared"],
)
def test_lists_of_a_laddered_size_change_nothing(name, backend, monkeypatch):
    """What a GPU computes, where sizes come from a ladder and counts are read ahead: loss, gradients, depths."""
    torch.manual_seed(0)
    model = MoRForCausalLM(tiny_config(name, initializer_range=0.2)).double().train()
    documents = DOCUMENTS if backend != "explicit" else None

    def step() -> tuple[Tensor, Tensor, list[Tensor]]:
        model.zero_grad()
        output = model(TOKENS, labels=TOKENS, document_ids=documents, num_documents=9)
        output.loss.backward()
        return output.loss.detach(), output.routing.depth, [p.grad for p in model.parameters() if p.grad is not None]

    expected = step()
    monkeypatch.setattr(decoder, "LADDERED", {"cpu"})
    monkeypatch.setattr("model.attention.visible.STEP", 8)
    if backend == "varlen" and name not in ("token-recursion_wise", "ut", "ut-basic"):
        with only("varlen"), pytest.raises(ValueError, match="queries and keys are not the same tokens"):
            step()
        return
    with only(backend):
        loss, depth, gradients = step()
    torch.testing.assert_close(loss, expected[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(depth, expected[1]) and len(gradients) == len(expected[2])
    for got, value in zip(gradients, expected[2], strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-4)


def test_a_backend_that_cannot_serve_says_why():
    config, rows = tiny_config("vanilla"), Rows(1, 4, CPU, real=torch.ones(1, 4, dtype=torch.bool))
    assert see(Visible(rows), config, torch.float32, False).backend == "cpu"
    with only("varlen"), pytest.raises(ValueError, match="'varlen' cannot serve this call: padding"):
        see(Visible(rows), config, torch.float32, False)
    config._attn_implementation = "eager"
    assert see(Visible(rows), config, torch.float32, False).backend == "explicit"
