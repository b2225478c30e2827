"""Packed layers against the model's own: the engine's other tests run in fp64, which nothing packs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import hardware
from model.inference.engine import Engine
from model.inference.packed import Product
from model.inference.sampling import SamplingParams
from tests.helpers.tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["as it is", "plain"])
def packs(request, monkeypatch):
    """Asks whether weights of a type are packed: on this CPU as it is, and with its capabilities hidden."""
    if request.param == "plain":
        if not hardware.physical_cpu().packs_bf16:
            pytest.skip("this CPU has no instructions for packed bf16 that could be hidden: both ways are one")
        monkeypatch.setenv(hardware.SWITCH, "1")
    return lambda dtype: hardware.packs(dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [(False, False), (True, True)])
def test_a_product_is_its_projections_side_by_side(dtype, biases, packs):
    torch.manual_seed(0)
    first, second = (nn.Linear(24, size, bias=bias, dtype=dtype) for size, bias in zip((10, 6), biases))
    both = Product(first, second)
    assert (both.packed is not None) == packs(dtype)
    for rows in (1, 3, 5, 40):
        x = torch.randn(rows, 24, dtype=dtype)
        with torch.inference_mode():
            expected = torch.cat([first(x), second(x)], -1)
            torch.testing.assert_close(both(x), expected)
            assert not torch.equal(both(x + 1), expected)


@pytest.mark.parametrize("variant", ["vanilla", "recursive-shared", "expert-recursion_wise", "token-shared_update"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_engines_choose_what_the_model_chooses(variant, dtype, packs):
    """Each token that is generated stands, for the model itself, within rounding of the best."""
    model = tiny_model(variant, 1).to(dtype)
    engine = Engine(model, max_batch=6, kv_tokens=300)
    requests = engine.generate([[i + 1, i + 7, i + 3] for i in range(6)], SamplingParams(max_tokens=12))
    assert (engine.layers[0].down.packed is not None) == packs(dtype)
    slack = 1e-4 if dtype == torch.float32 else 0.15
    for request in requests:
        with torch.no_grad():
            out = model(torch.tensor([request.text[:-1]]))
        if out.routing is not None and out.routing.depth[0].tolist() != request.depths:
            assert dtype == torch.bfloat16  # a router's score on the edge may fall either way
            continue
        logits = out.logits[0, 2:].float()
        chosen = logits.gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < slack * logits.std()
    assert sum(len(request.tokens) for request in requests) == 72


def test_fp32_is_packed_wherever_onednn_is():
    assert (Product(nn.Linear(8, 8)).packed is not None) == torch.backends.mkldnn.is_available()
