"""Equal states score equal, bit for bit, wherever they stand: what ties, and every other decision, rest on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import MoRConfig
from model.depth import capacity, routers, token_choice
from model.depth.mixture_of_depths import Predictor
from model.depth.routers import Router
from model.depth.universal import Halting
from model.inference.sampling import SamplingParams, choose

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
KINDS = ["linear", "mlp"]
SHAPES = {"states": st.integers(1, 12), "rows": st.integers(1, 200), "width": st.integers(2, 300)}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
LAYOUTS = st.sampled_from(["dense", "columns", "every other", "late"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [N, D] with other strides, or starting within its storage."""
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "every other":
        return torch.stack([x, x], 1)[:, 0]
    return torch.cat([x[:1], x])[1:] if layout == "late" else x


def router_of(kind: str, width: int, outputs: int, temperature: float = 1.0) -> Router:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    recursive = {"num_recursions": 3, "num_hidden_layers": 5, "routing": "expert_choice"}
    config = MoRConfig(hidden_size=width, **heads, **recursive, router=kind, router_temperature=temperature)
    router = Router(config, outputs)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return router


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(**SHAPES, outputs=st.integers(1, 5), dtype=DTYPES, layout=LAYOUTS, seed=st.integers(0, 2**31), data=st.data())
def test_equal_states_score_equal_wherever_they_stand(
    device, kind, states, rows, width, outputs, dtype, layout, seed, data
):
    """In one call, and in calls of other shapes: each state alone, in a batch, in part of it."""
    torch.manual_seed(seed)
    router = router_of(kind, width, outputs, data.draw(st.sampled_from([1.0, 0.3]))).to(device)
    distinct = (torch.randn(states, width) * 10 ** data.draw(st.integers(-3, 3))).to(dtype).to(device)
    which = torch.randint(0, states, (rows,), device=device)
    x = laid_out(distinct[which], layout)
    scores = router(x)
    alone = torch.cat([router(state[None]) for state in distinct])
    assert scores.dtype == torch.float32 and torch.equal(scores, alone[which])
    start = data.draw(st.integers(0, rows - 1))
    assert torch.equal(router(x[start:]), scores[start:])
    if rows % 2 == 0:
        assert torch.equal(router(x.unflatten(0, (2, -1))), scores.unflatten(0, (2, -1)))
    for activation in ("softmax", "sigmoid"):
        depths = token_choice.depth_scores(scores, activation, 1.0)
        assert torch.equal(depths, token_choice.depth_scores(alone, activation, 1.0)[which])


@pytest.mark.parametrize("scorer", [lambda width: Halting(width, 1), Predictor], ids=["halting", "predictor"])
@settings(deadline=None, max_examples=30)
@given(**SHAPES, dtype=DTYPES, layout=LAYOUTS, seed=st.integers(0, 2**31))
def test_scorers_of_other_methods_score_equal_states_equal(scorer, states, rows, width, dtype, layout, seed):
    torch.manual_seed(seed)
    unit, distinct = scorer(width), torch.randn(states, width).to(dtype)
    which = torch.randint(0, states, (rows,))
    alone = torch.cat([unit(state[None]) for state in distinct])
    assert torch.equal(unit(laid_out(distinct[which], layout)), alone[which])


@settings(deadline=None, max_examples=60)
@given(**SHAPES, outputs=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_exact_products_are_products(states, rows, width, outputs, seed):
    """Up to what rounding to integers leaves out; gradients are the plain product's, bit for bit."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, states, width), torch.randn(outputs, width)
    grad = torch.randn(rows, states, outputs)
    results = []
    for product in (routers.exact_linear, F.linear):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(*leaves)
        y.backward(grad)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    (y, *gradients), (_, *expected) = results
    scale = width * x.abs().amax() * weight.abs().amax()
    assert (y.double() - F.linear(x.double(), weight.double())).abs().max() <= 2.0**-21 * scale
    for got, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_exact_products_stay_exact_when_they_are_compiled(outputs, dtype):
    """As sums where the outputs are few: the same scores, bit for bit, and the same gradients up to their rounding."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(routers.exact_linear, backend="aot_eager")
    x, weight = torch.randn(4, 7, 96).to(dtype), torch.randn(outputs, 96).to(dtype)
    results = []
    for product in (routers.exact_linear, compiled):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(*leaves)
        y.sin().sum().backward()
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1])


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 1.0], [0.0, 0.0], [1e-42, 0.0]])
    y = routers.exact_linear(x, torch.tensor([[1.0, 0.5]]))[:, 0]
    assert y[0] == 2.0 and not y[1:3].isfinite().any() and y[3] == 0.0 and 0.0 <= y[4] < 1e-38


def test_no_gradient_is_computed_that_nobody_asks_for():
    """The auxiliary router reads detached states: one product backward, as torch's counter sees it."""
    from torch.utils.flop_counter import FlopCounterMode

    weight = torch.randn(1, 8, requires_grad=True)
    for x, products in ((torch.randn(5, 8), 2), (torch.randn(5, 8, requires_grad=True), 3)):
        with FlopCounterMode(display=False) as counter:
            routers.exact_linear(x, weight).sum().backward()
        assert counter.get_total_flops() == products * 2 * 5 * 8


@pytest.mark.parametrize("function", [F.gelu, torch.sigmoid, torch.logit], ids=["gelu", "sigmoid", "logit"])
@settings(deadline=None, max_examples=60)
@given(value=st.floats(0.001, 0.999), count=st.integers(1, 100))
def test_elementwise_functions_give_equal_entries_equal_results(function, value, count):
    assert len(routers.elementwise(function, torch.full((count, 3), value)).unique()) == 1
    assert len(routers.elementwise(function, torch.full((count,), value, dtype=torch.float64)).unique()) == 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 40), share=st.floats(0.1, 1.0))
def test_equal_states_are_chosen_from_the_left(seed, length, share):
    """A row of two states: of each, the chosen are the earliest, whatever padding follows."""
    torch.manual_seed(seed)
    router, distinct = router_of("mlp", 24, 1), torch.randn(2, 24)
    which = torch.randint(0, 2, (length,))
    size = capacity.selection_size(share, length)
    x = F.pad(distinct[which], (0, 0, 0, 9))[None]
    used = (torch.arange(length + 9) < length)[None]
    chosen = capacity.selected_mask(router(x).squeeze(-1), None, used, torch.tensor([[size]]))[0]
    for state in (0, 1):
        flags = chosen[:length][which == state].tolist()
        assert flags == sorted(flags, reverse=True)
    assert chosen.sum() == size


def test_equal_logits_give_the_token_of_the_lowest_number():
    """Greedy decoding, as torch's own argmax has it, at every row of a batch."""
    logits = torch.zeros(37, 101).index_fill_(1, torch.tensor([17, 60, 99]), 1.5)
    assert choose(logits, [SamplingParams()] * 37, [None] * 37) == [17] * 37  # type: ignore[list-item]
    assert logits.argmax(-1).tolist() == [17] * 37
