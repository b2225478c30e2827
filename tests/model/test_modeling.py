"""The model as a whole: equal to Llama, saved and loaded, recomputed, compiled, and its losses in parts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model import MoRConfig, MoRForCausalLM, MoRModel
from model.layers import LMHead, _loss_and_change, _loss_and_change_to_compile, _rotate, _Rotated
from tests.helpers.variants import TRAINING, VARIANTS

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(name: str, **changes) -> MoRForCausalLM:
    torch.manual_seed(0)
    return MoRForCausalLM(MoRConfig(**(BASE | VARIANTS[name] | changes))).train()


def batch(seed: int = 0, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: MoRForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_vanilla_is_llama_bit_for_bit(tied):
    """Same keys, same logits, same gradients; weights go both ways."""
    model = build("vanilla", tie_word_embeddings=tied)
    llama = LlamaForCausalLM(LlamaConfig(**BASE, tie_word_embeddings=tied, rms_norm_eps=1e-5)).train()
    assert list(llama.state_dict()) == list(model.state_dict())
    llama.load_state_dict(model.state_dict())
    ids = batch()
    ours, theirs = model(ids, labels=ids, return_logits=True), llama(ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_eager_attention_equals_sdpa():
    for name in ("vanilla", "expert-z-update", "token-z"):
        model = build(name).eval()
        expected = model(batch(), routing_mode="topk", document_ids=(torch.arange(24) // 9)[None].expand(2, -1)).logits
        model.set_attn_implementation("eager")
        got = model(batch(), routing_mode="topk", document_ids=(torch.arange(24) // 9)[None].expand(2, -1)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRAINING)
def test_save_and_load(name, tmp_path):
    model = build(name)
    if model.model.router_bias is not None:
        model.update_router_bias(torch.tensor([0.6, 0.3, 0.1]))
    model.eval().save_pretrained(tmp_path)
    ids = batch()
    expected = model(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoRForCausalLM) and loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, expected)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoRConfig)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(decoder, MoRModel) and torch.equal(decoder.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["expert-z-update", "token-z-shared"])
def test_weights_of_before_routers_belonged_to_the_method_load(name, tmp_path):
    """Under the names of then, from a folder and from a state dict; they are saved under today's."""
    model = build(name)
    model.update_router_bias(torch.tensor([0.6, 0.3, 0.1]))
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    then = {key.replace("model.depth.", "model."): value for key, value in load_file(file).items()}
    assert any("router" in key for key in then)
    save_file(then, file, {"format": "pt"})
    loaded = MoRForCausalLM.from_pretrained(tmp_path / "old")
    loaded.save_pretrained(tmp_path / "new")
    assert "lm_head.weight" not in then
    AutoModel.from_pretrained(tmp_path / "old")
    other = build(name)
    other.load_state_dict(then | {"lm_head.weight": then["model.embed_tokens.weight"]})
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and torch.equal(other.state_dict()[key], value), key
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}


def test_weights_of_another_architecture_are_refused(tmp_path):
    build("vanilla").save_pretrained(tmp_path)
    config = build("expert-z").config
    with pytest.raises(
        ValueError, match=r"not the weights of this mor_expert model, 3 missing keys: model.depth.routers.0.weight"
    ):
        MoRForCausalLM.from_pretrained(tmp_path, config=config)


def test_shared_layers_are_registered_once():
    model = build("expert-z")
    names = [name for name, _ in model.named_parameters()]
    assert len(model.units()) == 3 == len({id(unit) for unit in model.units()})
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "1", "2"}
    assert "lm_head.weight" not in names and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("policy", ["block", "recursion", "selective", "standard"])
@pytest.mark.parametrize("name", TRAINING)
def test_recomputation_changes_nothing(name, policy):
    """Losses, auxiliary ones too, and gradients are identical."""
    model, ids = build(name), batch()
    documents = (torch.arange(24) // 10)[None].expand(2, -1)
    torch.manual_seed(1)
    plain = model(ids, labels=ids, document_ids=documents)
    plain.loss.backward()
    expected = gradients(model)
    assert len(expected) == len(list(model.parameters()))
    model.zero_grad()
    if policy == "standard":
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    else:
        model.set_recompute(policy)
    torch.manual_seed(1)
    again = model(ids, labels=ids, document_ids=documents)
    again.loss.backward()
    assert {k: v.item() for k, v in again.losses.items()} == {k: v.item() for k, v in plain.losses.items()}
    for key, value in gradients(model).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("policy", ["block", "recursion", "selective"])
@pytest.mark.parametrize("name", ["recursive-norms", "expert-z", "token-z"])
def test_recomputation_under_autocast_changes_no_gradient(name, policy):
    """A weight that several recursions apply is cast once by autocast's cache, and again where it is recomputed."""
    expected, ids = None, batch()
    for chosen in ("none", policy):
        model = build(name)
        model.set_recompute(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        expected = expected or gradients(model)
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=0.02, atol=0.02 * float(expected[key].abs().max()))


def test_unknown_recomputation_is_refused():
    with pytest.raises(ValueError, match="recompute: expected one of none, block, recursion, selective"):
        build("vanilla").set_recompute("all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_equals_cross_entropy(dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("model.layers.chunk_rows", lambda vocabulary, device: 64)
    head = LMHead(16, 200, bias=False).to(dtype)
    x = torch.randn(3, 100, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 200, (3, 100))
    targets[0, :7] = -100
    plain = torch.nn.functional.cross_entropy(head(x).float().flatten(0, 1), targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(plain * 0.5, [x, head.weight])
    fused = head(x, targets)
    got = torch.autograd.grad(fused * 0.5, [x, head.weight])
    assert fused.dtype == torch.float32 and fused.item() == pytest.approx(plain.item(), rel=1e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-2}
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():
        assert head(x, targets).item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_heads_compiled_form_is_the_same_function():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 17, dtype=torch.float64), torch.randint(0, 17, (50,))
    targets[:9] = -100
    expected = _loss_and_change(logits.clone(), targets)
    for got, value in zip(_loss_and_change_to_compile(logits, targets), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("counts", "rotated"), [((3, 2, 2), 2), ((2, 2), 1)])
def test_heads_rotated_together_are_those_rotated_apart(counts, rotated):
    """What a GPU computes in one kernel: the same values and gradients, whatever the tables hold."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, sum(counts), 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2))
    parts = x.split(counts, -2)
    apart = [_rotate(part, cos, sin) if i < rotated else part for i, part in enumerate(parts)]
    together = _Rotated.apply(x, cos, sin, counts, rotated)
    torch.testing.assert_close(list(together), apart)
    ways = [torch.randn_like(part) for part in parts]
    grads = [torch.autograd.grad(ys, x, ways)[0] for ys in (together, apart)]
    torch.testing.assert_close(*grads)


def test_fused_head_never_holds_all_logits():
    """The largest tensor that the head makes is one chunk, not [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                largest = max(largest, result.numel())
            return result

    head = LMHead(4, 2**18, bias=False)
    x = torch.randn(192, 4, requires_grad=True)
    with Watch():
        head(x, torch.zeros(192, dtype=torch.long)).backward()
    assert 0 < largest <= 2**24 < 192 * 2**18


@pytest.mark.parametrize("name", TRAINING)
def test_accumulation_adds_up_to_the_whole_batch(name):
    """With num_items_in_batch (and the global load) the losses and gradients of micro-batches sum to the batch's."""
    model, ids = build(name, lora_dropout=0.0), batch(rows=4)
    whole = model(ids[:, :-1], targets=ids[:, 1:])
    whole.loss.backward()
    expected, items = gradients(model), ids[:, 1:].numel()
    model.zero_grad()
    load = whole.routing.load if whole.routing is not None else None
    summed = dict.fromkeys(whole.losses, 0.0)
    for part in ids.split(1):
        output = model(part[:, :-1], targets=part[:, 1:], num_items_in_batch=items, global_load=load)
        output.loss.backward()
        summed = {key: summed[key] + value.item() for key, value in output.losses.items()}
    assert summed == pytest.approx({key: value.item() for key, value in whole.losses.items()}, rel=1e-5)
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-6)


def test_total_is_the_weighted_sum_of_the_parts():
    output = build("expert-z", selection_coefficient=0.5)(batch(), labels=batch())
    parts = output.losses
    assert output.loss.item() == pytest.approx((parts["lm"] + 0.5 * parts["selection"] + 1e-3 * parts["z"]).item())
    output = build("token-z", balancing_coefficient=0.2)(batch(), labels=batch())
    parts = output.losses
    assert output.loss.item() == pytest.approx((parts["lm"] + 0.2 * parts["balancing"] + 1e-3 * parts["z"]).item())


def test_labels_and_targets_exclude_each_other():
    ids = batch()
    model = build("vanilla")
    with pytest.raises(ValueError, match="targets: exclusive with labels"):
        model(ids, labels=ids, targets=ids)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert model(ids, labels=ids).loss.item() == model(ids, targets=shifted).loss.item()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None


def test_auxiliary_router_learns_apart_from_the_model():
    """Its loss reaches its own weights and nothing else."""
    model = build("expert-z-update")
    model(batch(), labels=batch()).losses["selection"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in model.named_parameters() if "aux_routers" in name}


@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared", "shared_update"])
def test_every_module_runs_though_no_token_goes_deep(kv_strategy):
    """Ranks of a sharded run must run the same modules: one dummy token stands in, and changes nothing."""
    model = build("token-z", kv_strategy=kv_strategy, balancing="loss_free", z_loss_coefficient=0.0)
    model.model.router_bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    output = model(batch(), labels=batch())
    output.loss.backward()
    assert output.routing.depth.unique().tolist() == [1] and len(calls) == 3
    assert output.routing.load.tolist() == [1.0, 0.0, 0.0]
    deep = gradients(model)
    model.zero_grad()
    method = model.model.depth
    method.layout, layout = (*method.layout[:2], method.layout[-1]), method.layout
    shallow_output = model(batch(), labels=batch())
    shallow_output.loss.backward()
    method.layout = layout
    assert shallow_output.loss.item() == output.loss.item()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, deep[key])


def test_balancing_warm_up_takes_the_full_depth():
    model = build("token-z", balancing_warmup_steps=3)
    assert model(batch(), step=2).routing.depth.unique().tolist() == [3]
    assert len(model(batch(), step=3).routing.depth.unique()) > 1
    assert len(model(batch()).routing.depth.unique()) > 1
    assert len(model.eval()(batch(), step=0).routing.depth.unique()) > 1


def test_capacity_warm_up_narrows():
    model = build("expert-z", capacity_warmup_steps=4)
    counts = [model(batch(), step=step).routing.counts[0].tolist() for step in (0, 2, 4)]
    assert counts == [[24, 24, 24], [24, 20, 16], [24, 16, 8]]
    assert model(batch()).routing.counts[0].tolist() == [24, 16, 8]


def test_loss_free_bias_moves_against_the_load():
    model = build("token-z", balancing="loss_free", bias_update_rate=0.5)
    model.update_router_bias(torch.tensor([0.6, 0.3, 0.1]))
    assert model.model.router_bias.tolist() == pytest.approx([-0.5, 0.5, 0.5])
    untouched = build("token-z")
    untouched.update_router_bias(torch.tensor([0.6, 0.3, 0.1]))
    assert untouched.model.router_bias is None


@pytest.mark.parametrize(
    "name",
    [
        *("vanilla", "recursive-norms", "expert-z", "expert-z-update", "token-z", "token-z-shared"),
        *("expert-propagated", "token-propagated", "mod-z", "mod-predictor", "ut", "ut-frozen"),
    ],
)
def test_bf16_autocast_trains(name):
    model = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch(), labels=batch())
    output.loss.backward()
    exact = build(name)(batch(), labels=batch())
    assert output.loss.dtype == torch.float32 and output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    assert all(value.dtype == torch.float32 for value in gradients(model).values())
    half = build(name).to(torch.bfloat16)
    half(batch(), labels=batch()).loss.backward()
    assert all(torch.isfinite(value).all() for value in gradients(half).values())


def test_generation_sees_only_the_past():
    """Greedy decoding equals the arg max of one pass over what it wrote."""
    model = build("expert-z").eval()
    written = model.generate(batch(rows=1, length=6), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 12)
    assert torch.equal(model(written).logits[0, 5:-1].argmax(-1), written[0, 6:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("vanilla", "recursive-norms", "recursive-shared", "expert-z", "expert-z-update"),
        *("expert-propagated", "mod-z", "mod-predictor", "ut", "exit-recursive"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(name, packed):
    """One graph at fixed shapes, with and without documents, whatever the step."""
    torch._dynamo.reset()
    model = build(name)
    # To differentiate the whole as one graph takes thrice as long as to trace it, and is done with documents alone;
    # there the step stands still: a number that changes is traced twice, first as itself.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if packed else "eager")
    documents = (torch.arange(24) // 10)[None].expand(2, -1) if packed else None
    steps = [7] * 4 if packed else [0, 1, 2, 9]
    given = [{"targets": batch(i), "document_ids": documents, "step": step} for i, step in enumerate(steps)]
    losses = [compiled(batch(i), **given[i]).loss for i in range(3)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    expected = [model(batch(i), **given[i]).loss.item() for i in range(3)]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(batch(3), **given[3]).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared"])
def test_token_choice_compiles_once_for_all_lengths(kv_strategy):
    """Every step sends another number of tokens to each depth; after the first steps nothing is compiled again."""
    torch._dynamo.reset()
    model = build("token-z", kv_strategy=kv_strategy, num_recursions=2, num_hidden_layers=4)
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(4):
        compiled(batch(i), targets=batch(i)).loss.backward()
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4, 10):
            output = compiled(batch(i), targets=batch(i))
            output.loss.backward()
            counts.add(tuple(output.routing.counts.sum(0).tolist()))
    assert len(counts) > 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "expert-z", "expert-z-update", "token-z", "token-z-shared"])
def test_masked_attention_by_block_changes_nothing(name, packed, monkeypatch):
    """Keys that no query of a block sees are left out: same loss and gradients as with one block for all."""
    documents = (torch.arange(24) // 10)[None].expand(2, -1) if packed else None
    results = []
    for size in (5, 1000):
        for place in ("attention.cpu.SPAN", "attention.cpu.KERNEL_BLOCK"):
            monkeypatch.setattr(f"model.{place}", size)
        model = build(name)
        model(batch(), labels=batch(), document_ids=documents).loss.backward()
        results.append(gradients(model))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "expert-z", "token-z-shared", "mod-z", "ut-frozen", "exit-dropout"])
def test_layers_compile_once_for_all_depths(name):
    """Compiled layer by layer the losses stay, and after the first steps nothing is compiled again."""
    torch._dynamo.reset()
    model = build(name)
    expected = [model(batch(i), targets=batch(i)).loss.item() for i in range(6)]
    model.compile_layers(backend="aot_eager")
    losses = [model(batch(i), targets=batch(i)).loss for i in range(3)]
    torch.stack(losses).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += [model(batch(i), targets=batch(i)).loss for i in range(3, 6)]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
