"""What layers that change nothing show of the rules around them: identities, and weights that add up to one."""

from __future__ import annotations

import pytest
import torch

from model.modeling import MoRForCausalLM
from tests.helpers.tiny import VOCABULARY, tiny_model

IDS = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def without_layers(variant: str, **fields) -> MoRForCausalLM:
    """A model whose layers give what they take, and whose steps add nothing to the states."""
    model = tiny_model(variant, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "step_embedding" in name:
                parameter.zero_()
    return model


def states_of(model: MoRForCausalLM, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states, and what they are where every layer is the identity."""
    inner = model.model
    with torch.no_grad():
        return inner(IDS, routing_mode=mode).last_hidden_state, inner.norm(inner.embed_tokens(IDS))


@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("variant", ["vanilla", "recursive-shared", "mod", "mod-random", "mod-z", "ut", "ut-frozen"])
def test_layers_that_do_nothing_are_the_identity(variant, mode):
    """Of Mixture-of-Depths with `delta`, and of ACT, whose weights add up to one."""
    states, expected = states_of(without_layers(variant), mode)
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["ut", "ut-frozen", "ut-frozen-cycle"])
@pytest.mark.parametrize("bias", [-6.0, -0.5, 6.0])
def test_weights_add_up_to_one_at_the_limit_of_steps(variant, bias):
    """Where nobody, some, or all have halted before it."""
    model = without_layers(variant)
    torch.nn.init.constant_(model.model.depth.halt.bias, bias)
    torch.nn.init.zeros_(model.model.depth.halt.weight)
    states, expected = states_of(model, "causal")
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)


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
