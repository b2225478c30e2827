"""Numeric cases of the methods that are not this paper's: Mixture-of-Depths (m) and Universal Transformer with ACT (u).

Cases are kept in `depth_cases`, and read from the folder in MOR_DEPTH_CASES besides. Those of early exits (k, l) and of
looped models with exit gates (o, x) wait for their methods.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model import MoRConfig, MoRForCausalLM
from tests.helpers.reference import Case

KEPT = Path(__file__).parent / "depth_cases"
ALL = Path(os.environ.get("MOR_DEPTH_CASES", Path(__file__).parents[3] / "shared" / "depth_cases"))
LOGITS, GRADIENTS, LOSSES = {"rtol": 0, "atol": 2e-5}, {"rtol": 1e-4, "atol": 1e-6}, {"rel": 2e-6}


def folders(groups: str) -> list[Any]:
    found = {path.parent.name: path.parent for root in (ALL, KEPT) for path in root.glob("*/case.json")}
    return [pytest.param(found[name], id=name) for name in sorted(found) if name[0] in groups]


def fields_of(case: Case) -> dict[str, Any]:
    """The case's model in fields of the configuration."""
    given = dict(case.info["model"])
    fields = {"rope_parameters": {"rope_type": "default", "rope_theta": given.pop("rope_theta")}}
    if "mod" in case.info:
        mod = case.info["mod"]
        predicted = any(name.startswith("param.predictor.") for name in case.tensors)
        fields |= {
            "routing": "mixture_of_depths",
            "routed_capacity": mod["capacity"],
            "routed_every": mod["every"],
            "router_activation": "sigmoid" if mod["gate"] == "sigmoid" else "none",
            "residual": mod["residual"].split()[0],
            "selection": "predictor" if predicted else "aux_loss" if "aux_coefficient" in mod else "none",
            "selection_coefficient": mod.get("aux_coefficient", 0.001),
        }
        return given | fields
    steps, block, mode = given.pop("max_steps"), given.pop("layers_in_block"), case.info["act"]["mode"]
    combine = "basic" if mode == "reference" else "frozen" if mode["frozen"] else mode["combine"]
    fields |= {"routing": "universal", "sharing": "cycle", "num_recursions": steps, "num_hidden_layers": steps * block}
    fields |= {"act_combine": combine, "act_epsilon": case.info["act"]["epsilon"]}
    return given | fields | {"ponder_coefficient": case.info["act"]["ponder_coefficient"]}


def name_of(name: str, config: MoRConfig) -> str:
    """Our name of a parameter of the case."""
    kind, _, rest = name.partition(".")
    if kind in ("router", "predictor"):
        depth, _, rest = rest.partition(".")
        rest = rest.replace("0.", "first.").replace("2.", "last.") if kind == "predictor" else rest
        return f"model.depth.{kind}s.{int(depth) // config.routed_every}.{rest}"
    if kind == "halt":
        return f"model.depth.{name}"
    return "model.depth.step_embedding.weight" if kind == "step_embedding" else name


def build(case: Case) -> MoRForCausalLM:
    config = MoRConfig(**fields_of(case))
    model = MoRForCausalLM(config)
    state = {name_of(name, config): value for name, value in case.prefixed("param.").items()}
    for name, value in state.items():
        if name.endswith("step_embedding.weight"):
            state[name] = value[: config.num_recursions]  # the row of a step after the last is not used
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def compare_gradients(case: Case, model: MoRForCausalLM) -> None:
    parameters = dict(model.named_parameters())
    for name, expected in case.prefixed("grad.").items():
        ours = parameters[name_of(name, model.config)].grad
        ours = torch.zeros_like(parameters[name_of(name, model.config)]) if ours is None else ours
        torch.testing.assert_close(
            ours, expected[: len(ours)], **GRADIENTS, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("folder", folders("m"))
def test_mixture_of_depths(folder: Path):
    """Logits, scores, choices, losses and gradients in training; the causal choice and its logits in evaluation."""
    case = Case.read(folder)
    model, ids = build(case).train(), case.tensors["input_ids"]
    config, figures = model.config, case.info["train"]
    output = model(ids, labels=case.tensors["labels"], return_logits=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, case.tensors["logits"], **LOGITS)
    assert output.losses["lm"].item() == pytest.approx(figures["lm_loss"], **LOSSES)
    assert output.loss.item() == pytest.approx(figures.get("total_loss", figures["lm_loss"]), **LOSSES)
    for depth in range(config.routed_every - 1, config.num_hidden_layers, config.routed_every):
        gate = depth // config.routed_every
        chosen = case.tensors[f"selected_tokens.{depth}"]
        if chosen.shape[1] == ids.shape[1]:  # a mask
            chosen = torch.stack([row.nonzero().squeeze(1) for row in chosen])
        assert torch.equal(output.routing.selected[gate], chosen.long())
        torch.testing.assert_close(
            output.hidden_states[depth + 1], case.tensors[f"hidden_after_layer.{depth}"], **LOGITS
        )
        if f"router_logits.{depth}" in case.tensors:
            scores = case.tensors[f"router_logits.{depth}"]
            torch.testing.assert_close(output.routing.scores[gate], scores, **LOGITS)
    output.loss.backward()
    compare_gradients(case, model)
    if "eval.logits" in case.tensors:
        with torch.no_grad():
            causal = model.eval()(ids, labels=case.tensors["labels"], routing_mode="causal")
        torch.testing.assert_close(causal.logits, case.tensors["eval.logits"], **LOGITS)
        assert causal.losses["lm"].item() == pytest.approx(case.info["eval"]["lm_loss"], **LOSSES)
        selected = [t for name, t in sorted(case.tensors.items()) if name.startswith("eval.selected.")]
        assert torch.equal(causal.routing.depth, torch.stack(selected).long().sum(0))


@pytest.mark.parametrize("folder", folders("u"))
def test_universal(folder: Path):
    """Logits, steps, losses and gradients of each way to combine the states."""
    case = Case.read(folder)
    model, figures = build(case).train(), case.info["train"]
    output = model(case.tensors["input_ids"], labels=case.tensors["labels"], return_logits=True)
    torch.testing.assert_close(output.logits, case.tensors["logits"], **LOGITS)
    assert torch.equal(output.routing.depth, case.tensors["n_updates"].long())
    assert output.losses["lm"].item() == pytest.approx(figures["lm_loss"], **LOSSES)
    assert output.losses["ponder"].item() == pytest.approx(figures["ponder"], **LOSSES)
    assert output.loss.item() == pytest.approx(figures["total_loss"], **LOSSES)
    assert output.routing.statistics["mean_steps"].item() == pytest.approx(figures["mean_steps"], **LOSSES)
    output.loss.backward()
    compare_gradients(case, model)


@pytest.mark.parametrize("folder", folders("klox"))
def test_cases_of_methods_to_come(folder: Path):
    pytest.skip(f"{folder.name}: this method is not built yet")
