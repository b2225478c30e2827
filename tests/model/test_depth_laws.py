"""What layers that change nothing show of the rules around them: identities, and weights that add up to one; and that
every law of the table of variants is tried on every way of spending depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.depth import METHODS
from model.depth.exits import WEIGHTS, loss_weights
from model.modeling import MoRForCausalLM
from tests.helpers.tiny import VOCABULARY, tiny_model
from tests.helpers.variants import COUNTED, GENERATING, SEEING, TRAINING, VARIANTS

IDS = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def without_layers(variant: str, **fields) -> MoRForCausalLM:
    """A model whose layers give what they take, and whose steps add nothing to the states."""
    model = tiny_model(variant, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "step_embedding" in name:
                parameter.zero_()
    return model


def logits_of(model: MoRForCausalLM, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what they are where every layer is the identity."""
    inner = model.model
    with torch.no_grad():
        return model(IDS, routing_mode=mode).logits, model.lm_head(inner.norm(inner.embed_tokens(IDS)))


IDENTITIES = ["vanilla", "recursive-shared", "mod", "mod-random", "mod-z", "ut", "ut-frozen"]
IDENTITIES += ["exit", "exit-state", "exit-recursive", "exit-classifier", "exit-latent", "exit-dropout"]
# MoR's gate multiplies what a block gives, its input included, so that a block that does nothing scales its states.
SCALES = ["expert-recursion_wise", "expert-shared", "expert-aux-shared_update", "expert-propagated"]
SCALES += ["token-recursion_wise", "token-sigmoid", "token-propagated"]


@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("variant", IDENTITIES)
def test_layers_that_do_nothing_are_the_identity(variant, mode):
    """Of Mixture-of-Depths with `delta`, of ACT, whose weights add up to one, and of exits, wherever tokens leave."""
    model = without_layers(variant)
    if variant.startswith("exit"):
        mode = "full" if mode == "topk" else mode
        left = model(IDS, routing_mode=mode).routing.depth < model.model.depth.gates
        assert left.any() == (mode == "causal")
    logits, expected = logits_of(model, mode)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("variant", SCALES)
def test_blocks_of_mor_that_do_nothing_scale_states_by_their_gates(variant, mode):
    """By more than 1 for each gate passed, and not at all where none was."""
    model = without_layers(variant)
    with torch.no_grad():
        output = model.model(IDS, routing_mode=mode, output_hidden_states=True)
    states, embedded = output.hidden_states[-2], model.model.embed_tokens(IDS)
    factor = states.norm(dim=-1) / embedded.norm(dim=-1)
    torch.testing.assert_close(F.cosine_similarity(states, embedded, dim=-1), torch.ones_like(factor))
    depth = output.routing.depth
    assert len(depth.unique()) > 1
    assert (factor[depth == 0] == 1.0).all() and (factor[depth > 0] > 1.0).all()


@pytest.mark.parametrize("kind", [*WEIGHTS, "enabled_sum"])
def test_weights_of_losses_at_exits_add_up_to_one(kind):
    for layers in ([6], [1, 6], [1, 2, 3, 4, 5, 6]):
        assert sum(loss_weights(kind, layers, 0.3)) == pytest.approx(1.0)


def test_every_law_is_tried_on_every_way_of_spending_depth():
    """A method that joins the table joins its laws: what a token may see, generation, training, FLOPs, identities."""
    known = {name for name, method in METHODS.items() if method.__module__.startswith("model.depth")}
    laws = {"seeing": SEEING, "generating": GENERATING, "training": TRAINING, "identities": IDENTITIES + SCALES}
    tried = {law: {VARIANTS[name].get("routing", "none") for name in names} for law, names in laws.items()}
    tried["counted"] = {fields.get("routing", "none") for fields in COUNTED}
    assert tried == dict.fromkeys(tried, known)


@pytest.mark.parametrize("variant", ["ut", "ut-frozen", "ut-frozen-cycle"])
@pytest.mark.parametrize("bias", [-6.0, -0.5, 6.0])
def test_weights_add_up_to_one_at_the_limit_of_steps(variant, bias):
    """Where nobody, some, or all have halted before it."""
    model = without_layers(variant)
    torch.nn.init.constant_(model.model.depth.halt.bias, bias)
    torch.nn.init.zeros_(model.model.depth.halt.weight)
    logits, expected = logits_of(model, "causal")
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_as_published_they_do_not():
    """`basic` halts nobody at the limit: the final norm hides the missing weight, the state before it shows it."""
    model = without_layers("ut-basic")
    torch.nn.init.constant_(model.model.depth.halt.bias, -2.0)
    torch.nn.init.zeros_(model.model.depth.halt.weight)
    with torch.no_grad():
        states = model.model(IDS, output_hidden_states=True).hidden_states[-2]
    p = torch.sigmoid(torch.tensor(-2.0)).item()
    expected = (1 - (1 - p) ** 3) * model.model.embed_tokens(IDS)
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)
