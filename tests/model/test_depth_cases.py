"""Numeric cases of the methods that are not this paper's: Mixture-of-Depths (m), Universal Transformer with ACT (u),
early exits of CALM (k) and LayerSkip (l), criteria and gates of looped models (x, o).

Cases are kept in `depth_cases`, and read from the folder in MOR_DEPTH_CASES besides.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model import MoRConfig, MoRForCausalLM
from model.cache import MoRCache
from model.depth import exits
from model.depth.exits import layer_dropout, loss_weights, rotated
from pretrain.exits import classifier_losses
from tests.helpers.reference import Case

KEPT = Path(__file__).parent / "depth_cases"
ALL = Path(os.environ.get("MOR_DEPTH_CASES", Path(__file__).parents[3] / "shared" / "depth_cases"))
LOGITS, GRADIENTS, LOSSES = {"rtol": 0, "atol": 2e-5}, {"rtol": 1e-4, "atol": 1e-6}, {"rel": 2e-6}
STATES = {"rtol": 5e-6, "atol": 2e-5}  # they reach 35, where 2e-5 are five steps of fp32


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
            output.hidden_states[depth + 1], case.tensors[f"hidden_after_layer.{depth}"], **STATES
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


def exit_model(case: Case, **fields: Any) -> MoRForCausalLM:
    """The case's vanilla model with exits after every layer."""
    given = dict(case.info["model"])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": given.pop("rope_theta")}}
    model = MoRForCausalLM(MoRConfig(**(given | rope | {"routing": "early_exit"} | fields)))
    state = case.prefixed("param.model.")
    model.model.load_state_dict(state, strict=False)
    assert {name for name, _ in model.model.named_parameters()} == set(state)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("folder", [f for f in folders("k") if "weighted_loss" in f.id])
def test_weighted_losses_of_exits(folder: Path):
    """CALM's loss over all layers and its gradients; each exit's logits are those of a model that ends there."""
    case = Case.read(folder)
    model, ids = exit_model(case), case.tensors["input_ids"]
    weights, per_exit = case.info["calm"]["weights"], case.info["train"]["loss_per_exit"]
    config = model.config
    layers = [*config.exit_layers, config.num_hidden_layers]
    assert loss_weights(config.exit_weights, layers) == pytest.approx(weights)
    output = model.train()(ids, labels=case.tensors["labels"], return_logits=True)
    assert output.loss.item() == pytest.approx(case.info["train"]["total_loss"], **LOSSES)
    assert output.losses["lm"].item() == pytest.approx(per_exit[-1], **LOSSES)
    early = sum(w * loss for w, loss in zip(weights[:-1], per_exit)) / sum(weights[:-1])
    assert output.losses["exits"].item() == pytest.approx(early, **LOSSES)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for name, expected in case.prefixed("grad.").items():
        torch.testing.assert_close(
            parameters[name].grad, expected, **GRADIENTS, msg=lambda t, name=name: f"{name}: {t}"
        )
    with torch.no_grad():
        for level, expected in enumerate(case.tensors["logits_per_exit"], 1):
            cut = model.eval()(ids, labels=case.tensors["labels"], routing_mode="full", max_recursions=level)
            torch.testing.assert_close(cut.logits, expected, **LOGITS)
            assert cut.losses["lm"].item() == pytest.approx(per_exit[level - 1], **LOSSES)


@pytest.mark.parametrize("folder", [f for f in folders("k") if "classifier" in f.id])
def test_classifier_of_exits(folder: Path):
    """The second phase: labels, logits, losses and gradients of the classifier, the model left as it is."""
    case = Case.read(folder)
    model = exit_model(case, exit_measure="classifier").eval()
    method = model.model.depth
    method.classifier_weight = case.tensors["param.classifier.weight"].requires_grad_()
    method.classifier_bias = case.tensors["param.classifier.bias"].requires_grad_()
    fits = list(classifier_losses(model, case.tensors["input_ids"], case.tensors.get("attention_mask")))
    figures = case.info["train"]
    for i, fit in enumerate(fits):
        torch.testing.assert_close(fit.logits, case.tensors["classifier_logits"][i].flatten(0, 1), **LOGITS)
        assert torch.equal(fit.agrees, case.tensors["agrees_with_last"][i].flatten().bool())
        assert fit.loss.item() == pytest.approx(figures["loss_per_layer"][i], **LOSSES)
    total = torch.stack([fit.loss for fit in fits]).mean()
    assert total.item() == pytest.approx(figures["total_loss"], **LOSSES)
    total.backward()
    for name in ("weight", "bias"):
        ours, expected = getattr(method, f"classifier_{name}").grad, case.tensors[f"grad.classifier.{name}"]
        torch.testing.assert_close(ours, expected, **GRADIENTS)
    assert all(p.grad is None for p in model.parameters())


def decoding_fields(run: dict[str, Any]) -> dict[str, Any]:
    fields = {"exit_measure": run["measure"], "exit_threshold": run["lam"], "exit_first": run.get("min_exit", 1)}
    if "tau" in run:
        fields |= {"exit_decay": "paper", "exit_decay_rate": float(run["tau"]), "exit_decay_length": run["N"]}
    return fields


@pytest.mark.parametrize("folder", [f for f in folders("k") if "decode" in f.id])
def test_decoding_with_exits(folder: Path):
    """Thresholds, confidences, exits, logits, tokens and the keys of tokens that left, in one pass and token by token.

    In fp64: the case's own rounding takes all of its tolerance (2.0e-5 of logits up to 10.6).
    """
    case = Case.read(folder)
    for name, run in case.info["runs"].items():
        model = exit_model(case, **decoding_fields(run)).double().eval()
        config, method, start = model.config, model.model.depth, len(run["prompt"])
        text = torch.tensor([run["prompt"] + run["tokens"]])
        with torch.no_grad():
            whole = model(text[:, :-1], prompt_length=start)
        torch.testing.assert_close(whole.logits[0, start - 1 :].float(), case.tensors[f"{name}.logits"], **LOGITS)
        layers = [*config.exit_layers, config.num_hidden_layers]
        depths = whole.routing.depth[0].tolist()
        assert [layers[depth] for depth in depths[start - 1 :]] == run["exit_layers"], name
        assert set(depths[:start]) == {len(layers) - 1}
        thresholds = method.thresholds(torch.arange(text.shape[1] - 1)[None], torch.tensor([[start]]))[0, start:]
        assert thresholds.tolist() == pytest.approx(run["thresholds"][1:], rel=1e-6)
        judged = [gate for gate, layer in enumerate(config.exit_layers) if layer >= config.exit_first]
        offered = {gate: [p for p, depth in enumerate(depths) if depth >= gate] for gate in judged}
        for token, expected in enumerate(run["confidences"]):
            place = start - 1 + token
            ours = [
                whole.routing.scores[judged.index(gate)][offered[gate].index(place)].item()
                for gate in judged
                if token and place in offered[gate] and layers[gate] <= run["exit_layers"][token]
            ]
            wanted = expected[config.exit_first - 1 :][: len(ours)]
            assert ours == pytest.approx(wanted, abs=2e-5)
        generated = model.generate(text[:, :start], max_new_tokens=len(run["tokens"]), do_sample=False)
        if not run["tokens_given"]:
            assert generated[0, start:].tolist() == run["tokens"]
        if f"{name}.keys.0" in case.tensors:
            cache = MoRCache(config)
            with torch.no_grad():
                for at in (slice(0, start), *(slice(i, i + 1) for i in range(start, text.shape[1] - 1))):
                    model(text[:, at], past_key_values=cache, use_cache=True, prompt_length=start)
            for depth in range(config.num_hidden_layers):
                for kind in ("keys", "values"):
                    ours = getattr(cache.layers[depth], kind).float()
                    torch.testing.assert_close(ours, case.tensors[f"{name}.{kind}.{depth}"], **LOGITS)


@pytest.mark.parametrize("folder", [f for f in folders("l") if "loss" in f.id])
def test_layerskip_losses(folder: Path):
    """Weights of the exits that learn, for every scale, and the gradients; which learn when; who skips a layer."""
    case = Case.read(folder)
    figures, curriculum = case.info["train"], case.info["curriculum"]
    kinds = {"uniform": "equal", "linear_l": "linear", "sum_l": "enabled_sum", "sqrt_l": "sqrt", "inv_l": "inverse"}
    layers = [int(layer) + 1 for layer in figures["loss_per_layer"]]
    losses = list(figures["loss_per_layer"].values())
    for name, expected in figures["scales"].items():
        kind, scale = name.split("_loss_scale.")
        weights = loss_weights(kinds[kind], layers, float(scale))
        assert weights == pytest.approx(expected, rel=1e-6)
        assert sum(w * x for w, x in zip(weights, losses)) == pytest.approx(figures["loss"][name], **LOSSES)
    model = exit_model(case, exit_layers=layers[:-1], exit_weights="enabled_sum", exit_scale=0.2).train()
    output = model(case.tensors["input_ids"], labels=case.tensors["labels"])
    assert output.loss.item() == pytest.approx(figures["loss"]["sum_l_loss_scale.0.2"], **LOSSES)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for name, expected in case.prefixed("grad.").items():
        torch.testing.assert_close(parameters[name].grad, expected, **GRADIENTS)
    for step, expected in enumerate(curriculum["rotational_every_4"]):
        learning = rotated(len(expected) - 1, 4, step)
        assert [int(i in learning) for i in range(len(expected) - 1)] == expected[:-1]
    expected = case.info["layer_dropout_probability"]["exp"]
    assert [layer_dropout(0.2, depth, len(expected)) for depth in range(len(expected))] == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("folder", folders("x"))
def test_criteria_of_loops(folder: Path):
    """Huginn's measures of what a step changed, and the first step at which each falls below its threshold."""
    case = Case.read(folder)
    states = case.tensors["latents"]  # [R, B, T, D]
    before = torch.cat([case.tensors["initial_latents"][None], states[:-1]])
    logits = (states @ case.tensors["param.lm_head.weight"].T)[:, :, -1]
    asked = {"kl": exits.divergence, "min_p_kl": exits.pruned_divergence, "entropy_diff": exits.entropy_change}
    values = {
        name: torch.stack([rule(now, logits[step - 1] if step else None) for step, now in enumerate(logits)])
        for name, rule in asked.items()
    }
    values["latent_diff"] = exits.relative_change(states, before).mean(-1)
    values["cosine"] = 1.0 - exits.similarity(states, before).mean(-1)
    for name, ours in values.items():
        torch.testing.assert_close(ours, case.tensors[f"{name}.values"], **LOGITS)
    for name, run in case.info["runs"].items():
        measure, threshold = name.split("@")
        if measure in values:  # not the stability of the best token, which is no measure here
            below = values[measure] < float(threshold)
            first = [int(row.int().argmax()) + 1 if row.any() else -1 for row in below.T]
            assert first == run["exit_step"], name


@pytest.mark.parametrize("folder", folders("o"))
def test_learned_exits_of_loops(folder: Path):
    """Ouro's exit distribution, the step at which it adds up, and the losses of both its stages, with gradients."""
    case = Case.read(folder)
    weights = {n: v.clone().requires_grad_() for n, v in case.prefixed("param.").items() if "layers" not in n}
    gate = [weights[f"model.early_exit_gate.{name}"] for name in ("weight", "bias")]
    hidden, objective, figures = case.tensors["hidden_per_step"], case.info["objective"], case.info["train"]
    gates = torch.sigmoid(torch.nn.functional.linear(hidden, *gate)).squeeze(-1)
    torch.testing.assert_close(gates, case.tensors["gate_probability"], rtol=0, atol=1e-6)
    p = exits.exit_distribution(gates)
    torch.testing.assert_close(p, case.tensors["exit_distribution"], rtol=0, atol=1e-6)
    for quantile in case.info["exit"]:
        assert torch.equal(exits.exit_step(p, float(quantile)), case.tensors[f"exit_step.{quantile}"].long())
    losses = case.tensors["loss_per_step_and_token"]
    stage_1 = exits.expected_exit_loss(losses, p[..., :-1], objective["beta"])
    assert stage_1.item() == pytest.approx(figures["stage1"], **LOSSES)
    labels = exits.improvement_labels(losses, objective["k"], objective["gamma"])
    torch.testing.assert_close(labels, case.tensors["improvement_label"], rtol=0, atol=1e-6)
    stage_2 = exits.improvement_loss(gates[..., :-1], labels)
    assert stage_2.item() == pytest.approx(figures["stage2"], **LOSSES)
    for stage, loss in (("stage1", stage_1), ("stage2", stage_2)):
        for name, ours in zip(("weight", "bias"), torch.autograd.grad(loss, gate, retain_graph=True), strict=True):
            torch.testing.assert_close(ours, case.tensors[f"{stage}.grad.model.early_exit_gate.{name}"], **GRADIENTS)
