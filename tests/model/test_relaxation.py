"""Per-depth deltas, and models started from a vanilla one; the import command's mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from model import MoRConfig, MoRForCausalLM
from model.convert.reference import main
from model.convert.uptrain import from_vanilla, source_layers
from model.relaxation import RelaxedLinear, go_together, project_together

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(20)[None] * 3 % 61


def vanilla(depth: int = 8) -> MoRForCausalLM:
    torch.manual_seed(0)
    return MoRForCausalLM(MoRConfig(**BASE, num_hidden_layers=depth, initializer_range=0.1)).eval()


def recursive(**changes) -> MoRConfig:
    return MoRConfig(**(BASE | {"num_hidden_layers": 8, "num_recursions": 3, "initializer_range": 0.1} | changes))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_deltas_start_as_nothing(method):
    source = vanilla()
    plain = from_vanilla(source, recursive(), "average").eval()
    relaxed = from_vanilla(source, recursive(relaxation=method, lora_targets=ALL), "average").eval()
    torch.testing.assert_close(relaxed(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_full_rank_svd_gives_the_original_back(method):
    """The scaling is accounted for: with full rank every depth has its own weights again."""
    source = vanilla()
    config = recursive(relaxation=method, lora_targets=ALL, lora_rank=48, lora_alpha=96.0, share_norms=False)
    model = from_vanilla(source, config, "average", svd=True).eval()
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, rtol=1e-3, atol=1e-4)
    small = from_vanilla(
        source, recursive(relaxation=method, lora_targets=ALL, lora_rank=2), "average", svd=True
    ).eval()
    none = from_vanilla(source, recursive(), "average").eval()
    target = source(IDS).logits
    assert (small(IDS).logits - target).norm() < (none(IDS).logits - target).norm()


def test_dora_matches_its_definition():
    config = recursive(relaxation="dora", lora_rank=3)
    layer = RelaxedLinear(32, 16, True, config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(5, 32)
    weight = layer.weight + layer.scaling * layer.lora_B[1] @ layer.lora_A[1]
    expected = torch.nn.functional.linear(
        x, layer.lora_magnitude[1, :, None] * weight / weight.norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(layer(x, 1), expected + layer.bias, rtol=1e-4, atol=1e-4)


def test_more_layers_than_the_source_and_other_architectures():
    """The 135M base: 30 layers become 32 effective ones; routers start anew."""
    config = MoRConfig(num_hidden_layers=32, num_recursions=3)
    origins = source_layers(30, config, "stepwise")
    assert origins[0] == [0] and origins[-1] == [29] and len(origins) == 12
    assert sorted({i for group in source_layers(30, config, "average") for i in group}) == list(range(30))
    model = from_vanilla(vanilla(), recursive(routing="expert_choice"), "upper")
    assert torch.isfinite(model(IDS, labels=IDS).loss)
    draw = source_layers(30, config, "random", seed=4)
    assert draw == source_layers(30, config, "random", seed=4) != source_layers(30, config, "random", seed=5)


@pytest.mark.parametrize(
    ("config", "strategy", "svd", "message"),
    [
        (recursive(hidden_size=64), "average", False, "hidden_size: the source has 32"),
        (recursive(), "middle", False, "strategy: expected one of stepwise, average, lower, upper, random"),
        (recursive(), "average", True, "svd: needs relaxation 'lora' or 'dora'"),
        (recursive(num_hidden_layers=32), "average", False, "source: has 8 layers, fewer than the 12"),
    ],
)
def test_models_that_do_not_fit_are_refused(config, strategy, svd, message):
    with pytest.raises(ValueError, match=message):
        from_vanilla(vanilla(), config, strategy, svd=svd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: c.pop("model"), "model: expected a section"),
        (lambda c, s: c.update(mor={"type": "both"}), "mor.type: expected 'expert' or 'token'"),
        (lambda c, s: s.pop("model.norm.weight"), "lacks 1 parameters, the first is model.norm.weight"),
        (lambda c, s: s.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}), "depth 9 does not exist"),
        (lambda c, s: s.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight: shape (3,) does not fit"),
        (
            lambda c, s: s.update({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}),
            "model.layers.3.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight should be one shared tensor",
        ),
    ],
)
def test_import_names_what_is_wrong(tmp_path, capsys, change, message):
    names = {"hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
    config = {
        "model": {k: BASE[k] for k in sorted(names)} | {"num_hidden_layers": 8, "tie_word_embeddings": True},
        "recursive": {"num_recursion": 3, "sharing": "middle_cycle"},
    }
    state = {
        name.replace("model.layers.3.", "model.layers.7."): value.clone()
        for name, value in MoRForCausalLM(recursive()).state_dict().items()
        if name != "lm_head.weight"
    }
    change(config, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "state.safetensors")
    arguments = ["--state-dict", "state.safetensors", "--config", "config.json", "--output", "out"]
    code = main([a if a.startswith("--") else str(tmp_path / a) for a in arguments])
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_as_one_product(bias):
    """What a GPU computes in place of several products: the same values and gradients."""
    torch.manual_seed(0)
    projections = tuple(torch.nn.Linear(6, width, bias=bias).double() for width in (4, 2, 2))
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for projection in projections for p in projection.parameters())]
    apart, together = [p(x) for p in projections], project_together(projections, x).split((4, 2, 2), -1)
    for got, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), parameters) for ys in (together, apart)]
    torch.testing.assert_close(*grads)


def test_what_is_more_than_a_weight_is_projected_by_itself():
    plain, other = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, bias=False)
    assert go_together((plain, plain)) and not go_together((plain, other))
    config = MoRConfig(num_recursions=2, num_hidden_layers=6, relaxation="lora", lora_rank=2)
    assert not go_together((plain, RelaxedLinear(6, 4, True, config)))
    plain.register_forward_pre_hook(lambda *_: None)  # as ZeRO-3 gathers its weights
    assert not go_together((plain,))
