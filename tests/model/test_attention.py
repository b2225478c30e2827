"""Attention in bf16 on a CPU: its operators against attention written out in fp32, and what a model asks of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import MoRConfig, MoRForCausalLM
from model.attention import attend, through
from model.attention import cpu as attention
from model.flops import measured_flops
from tests.helpers.tiny import VOCABULARY, tiny_config

VARIANTS = ["vanilla", "expert-recursion_wise", "expert-shared", "token-recursion_wise", "token-shared"]
TOKENS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
DOCUMENTS = (torch.arange(40) // 17).expand(2, -1)


@pytest.fixture(autouse=True)
def _operators(monkeypatch):
    """The operators run on any CPU; they are chosen where they are fast."""
    monkeypatch.setattr(attention, "HAS_AMX", True)


def build(name: str, **changes) -> MoRForCausalLM:
    torch.manual_seed(0)
    return MoRForCausalLM(tiny_config(name, initializer_range=0.02, **changes)).train()


def gradients(model: MoRForCausalLM, documents: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of a step, and its loss under the name "loss"."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS, labels=TOKENS, document_ids=documents).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach()
    }


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


@st.composite
def problems(draw) -> tuple[list[Tensor], Tensor | None]:
    """query, key, value, gradient of the output; a mask of selected queries in documents, or None for causal."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, keys, width = draw(st.integers(1, 3)), draw(st.integers(2, 40)), draw(st.sampled_from([4, 16, 24, 64]))
    queries = draw(st.integers(2, keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = None
    if draw(st.booleans()):
        order = torch.rand(rows, keys, generator=generator).argsort(1)
        index = order[:, :queries].sort(1).values
        documents = (torch.rand(rows, keys, generator=generator) < 0.1).cumsum(1)
        mask = (torch.arange(keys) <= index[..., None]) & (documents.gather(1, index)[..., None] == documents[:, None])
        mask = mask[:, None]
    else:
        queries = keys
    shapes = [(rows, queries, kv_heads * group, width), *[(rows, keys, kv_heads, width)] * 2]
    sharp = draw(st.sampled_from([1.0, 4.0]))  # from flat to one-hot softmax
    tensors = [torch.randn(shape, generator=generator).mul(sharp).bfloat16().transpose(1, 2) for shape in shapes]
    return [*tensors, torch.randn(shapes[0], generator=generator).bfloat16().transpose(1, 2)], mask


def run(tensors: list[Tensor], mask: Tensor | None, config: MoRConfig, spans: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    seen = replace(through(mask, config, leaves[0].device), spans=spans)
    output = attend(*leaves, seen, config, True)
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3])]


def compare_operators(tensors: list[Tensor], mask: Tensor | None, spans: Tensor | None, **sizes: int) -> None:
    """Output and gradients against attention written out in fp32, and against what torch's own kernel misses of it."""
    written_out = tiny_config("vanilla")
    written_out._attn_implementation = "eager"
    exact = run([x.float() for x in tensors], mask, written_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "HAS_AMX", False)
        kernel = run(tensors, mask, tiny_config("vanilla"))
        patch.setattr(attention, "HAS_AMX", True)
        for name, size in sizes.items():
            patch.setattr(attention, name, size)
        got = run(tensors, mask, tiny_config("vanilla"), spans=spans)
    # Where the softmax is one-hot, gradients are differences that cancel.
    terms = tensors[3].float().norm() * max(1.0, *(x.abs().max().item() ** 2 for x in tensors[:3]))
    for ours, theirs, value in zip(got, kernel, exact, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == value.shape
        missed, theirs_missed = (ours.float() - value).norm(), (theirs.float() - value).norm()
        assert missed <= 0.02 * value.norm() + 3 * theirs_missed + 1e-4 * terms


@given(problems(), st.sampled_from([4, 8, 192]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_operators_equal_attention_written_out(problem, span, known):
    """Whatever the shape of the blocks and whether spans are given."""
    tensors, mask = problem
    sizes = {"SPAN": span, "KERNEL_BLOCK": 3 * span, "PRODUCT_BLOCK": 2 * span, "PRODUCT_SIZE": 900}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SPAN", span)
        spans = attention.spans_of(mask) if known and mask is not None else None
    compare_operators(tensors, mask, spans, **sizes)


@pytest.mark.parametrize("width", [16, 24, 32])
def test_large_scores_keep_their_gradients(width):
    """Scores of 50 that differ by few: what a scale rounds off a key would show (24 and 32 are no powers of 4)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        tensors = [4 * torch.randn(1, 3, 4, width, generator=generator) for _ in range(3)]
        tensors.append(torch.randn(1, 3, 4, width, generator=generator))
        compare_operators([x.bfloat16() for x in tensors], None, None)


def test_a_key_that_nobody_sees_gets_no_gradient():
    tensors = [torch.randn(1, 9, 2, 16).bfloat16().transpose(1, 2) for _ in range(4)]
    mask = (torch.arange(9) <= torch.arange(9)[:, None])[None, None].clone()
    mask[..., 4] = False
    mask[..., 4, 0] = True
    _, _, key, value = run(tensors, mask, tiny_config("vanilla"))
    assert not key[:, :, 4].any() and not value[:, :, 4].any() and key[:, :, 3].any()


def test_operators_are_declared_to_torch_as_they_are():
    """Schema, shapes without data, autograd and tracing."""
    query, key, value = (torch.randn(2, h, n, 8).bfloat16().requires_grad_() for h, n in ((4, 5), (2, 9), (2, 9)))
    mask = (torch.arange(9) <= torch.arange(5)[:, None] + 4).expand(2, 1, 5, 9)
    for inputs in ((query, key, value, mask, attention.spans_of(mask)), (query, key.detach(), value, mask, None)):
        torch.library.opcheck(attention._attention, inputs, atol=0.05, rtol=0.05)
    square = torch.randn(2, 4, 9, 8).bfloat16().requires_grad_()
    torch.library.opcheck(attention._attention, (square, key, value, None, None), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_stays_the_same(name, documents, monkeypatch):
    """Loss and gradients of a model under autocast are those of torch's own kernels, up to bf16."""
    got = gradients(build(name), documents)
    monkeypatch.setattr(attention, "HAS_AMX", False)
    expected = gradients(build(name), documents)
    assert got.keys() == expected.keys() and got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3)
    for parameter, value in expected.items():
        assert error(got[parameter], value) < 0.05, parameter


@pytest.mark.parametrize("policy", ["block", "recursion", "selective"])
@pytest.mark.parametrize("name", ["vanilla", "expert-shared", "token-shared"])
def test_recomputation_changes_nothing(name, policy):
    """Selective recomputation casts a weight anew at each use, so that its gradients add up in fp32 and not in bf16."""
    model = build(name)
    expected = gradients(model, DOCUMENTS)
    model.set_recompute(policy)
    for parameter, value in gradients(model, DOCUMENTS).items():
        if policy == "selective":
            assert error(value, expected[parameter]) < 0.01, parameter
        else:
            assert torch.equal(value, expected[parameter]), parameter


def test_selective_recomputation_keeps_the_output_of_attention(monkeypatch):
    calls = []
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(attention, "_flash", lambda *a, **k: calls.append(1) or flash(*a, **k))
    model = build("vanilla")
    gradients(model)
    once = len(calls)
    model.set_recompute("selective")
    gradients(model)
    assert once == model.config.num_hidden_layers and len(calls) == 2 * once


def test_switched_off_where_dropout_or_no_flash_attention_is_asked_for(monkeypatch):
    def refuse(*args):
        raise AssertionError("the operator ran")

    expected = measured_flops(lambda: build("expert-recursion_wise")(TOKENS, labels=TOKENS).loss.backward())
    monkeypatch.setattr(attention, "_attention", refuse)
    assert measured_flops(lambda: gradients(build("expert-recursion_wise"))) == expected
    gradients(build("vanilla", attention_dropout=0.1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        build("vanilla")(TOKENS)
    with pytest.raises(AssertionError, match="the operator ran"):
        gradients(build("vanilla"))


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", ["vanilla", "expert-recursion_wise", "expert-shared"])
def test_compiles_without_graph_breaks(name, documents):
    torch._dynamo.reset()
    model = build(name)
    expected = gradients(model, documents)
    model.compile(fullgraph=True, backend="aot_eager")
    for parameter, value in gradients(model, documents).items():
        assert error(value, expected[parameter]) < 0.02, parameter
