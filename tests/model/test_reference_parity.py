"""Numbers of the authors' implementation, case by case.

Each case pins one setting: logits in train and eval mode, each loss term, gradients, selected tokens, depth shares,
hidden states after each recursion, initialisation maps, LoRA, recursion encoding, a few optimizer steps. Cases under
MOR_REFERENCE_CASES (default ../shared/reference_cases) run beside a small set kept in this repository. Every case goes
through `python -m model.convert.reference`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model.config import MoRConfig
from model.convert.uptrain import from_vanilla, source_layers
from model.depth.capacity import factor_at, selection_loss, selection_size
from model.depth.token_choice import depth_scores
from model.modeling import MoRCausalLMOutput, MoRForCausalLM
from model.sharing import applications, layer_index
from tests.helpers.reference import ALL, KEPT, Case, case_folders, compare_parameters

FOLDERS = case_folders()
LOGITS = {"rtol": 1e-5, "atol": 2e-5}
LOSSES = {"rel": 2e-6, "abs": 1e-6}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}


def select(letters: str, without: str = "") -> list:
    chosen = [f for f in FOLDERS if f.name[0] in letters and not f.name.startswith(tuple(without.split()) or ("-",))]
    return [pytest.param(f, id=f"{'kept' if f.parent == KEPT else 'all'}-{f.name}") for f in chosen]


def close(ours, theirs, name: str, **tolerance) -> None:
    torch.testing.assert_close(ours.detach(), theirs, **tolerance, msg=lambda text: f"{name}: {text}")


def test_some_cases_are_always_present():
    kept = {folder.name[0] for folder in FOLDERS if folder.parent == KEPT}
    assert kept >= set("bcdef"), f"{KEPT} lacks cases"
    assert not ALL.exists() or any(folder.parent == ALL for folder in FOLDERS)


def their_step(case: Case, model: MoRForCausalLM) -> int:
    """Optimizer step of the train pass. Their counter is raised before it is used: the capacity formula sees the raised
    value, and the import has already shifted the token-choice warm-up."""
    counter = case.info.get("training_step_counter_before_forward", 0)
    return counter + 1 if model.config.routing == "expert_choice" else counter


def their_total(output: MoRCausalLMOutput, config: MoRConfig, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' total from this model's parts: their BCE is not divided by the accumulation steps. And ours."""
    assert output.losses is not None
    parts = dict(output.losses)
    selection = parts.get("selection", torch.zeros(()))
    total = parts["lm"] + config.z_loss_coefficient * parts.get("z", 0.0)
    total = total + config.balancing_coefficient * parts.get("balancing", 0.0)
    weight = 1.0 if config.selection == "aux_router" else config.selection_coefficient
    return total + weight * selection / share, total + weight * selection


def check_routing(case: Case, mode: str, suffix: str, output: MoRCausalLMOutput, config: MoRConfig) -> None:
    """Scores, selected tokens, depths and hidden states against the reference."""
    record, states = output.routing, output.hidden_states
    assert record is not None and states is not None
    first = 1 + config.sharing.startswith("middle_")
    if config.routing == "expert_choice":
        for r in range(config.num_recursions):
            for ours, name in (
                (record.scores[r], f"router_logits.{r}"),
                (record.selected[r], f"selected_tokens.{r}"),
                (states[first + r], f"hidden_after_recursion.{r}"),
            ):
                theirs = case.expected(mode + suffix, name)
                assert theirs is not None, name
                close(ours, theirs, name, **LOGITS)
        return
    assert torch.equal(record.depth - 1, case.expected(mode + suffix, "depth_index"))
    close(record.scores[0], case.expected(mode + suffix, "router_logits"), "router_logits", **LOGITS)
    close(states[first], case.expected(mode + suffix, "hidden_after_mor"), "hidden_after_mor", **LOGITS)


def check_figures(case: Case, figures: dict, output: MoRCausalLMOutput, model: MoRForCausalLM, share: float) -> None:
    """Loss terms and shares of one micro-batch of training."""
    config, losses, record = model.config, output.losses, output.routing
    assert losses is not None
    assert losses["lm"].item() == pytest.approx(figures["lm_loss"], **LOSSES)
    if record is None:
        return
    if config.routing == "expert_choice":
        if config.selection != "none":
            assert losses["selection"].item() / share == pytest.approx(figures["sampling_loss"], **LOSSES)
        assert record.counts.tolist() == [figures["tokens_per_recursion"]] * record.counts.shape[0]
        if config.selection == "aux_loss" and config.router_activation in ("sigmoid", "tanh"):
            assert record.statistics["selection_accuracy"].item() * 3 == pytest.approx(
                figures["sampling_acc"] * 3, abs=1e-5
            )
    else:
        if config.balancing == "loss":
            assert losses["balancing"].item() == pytest.approx(figures["balancing_loss"], **LOSSES)
        assert record.load.tolist() == pytest.approx(figures["balancing_ratio"], abs=1e-6)
        per_depth = [[(row == d).sum().item() for d in range(1, config.num_recursions + 1)] for row in record.depth]
        assert per_depth == figures["tokens_per_depth_per_sequence"]
    if config.z_loss_coefficient:
        assert losses["z"].item() == pytest.approx(figures["router_z_loss"], **LOSSES)


@pytest.mark.parametrize("folder", select("abcd"))
def test_training_pass(folder: Path, tmp_path: Path):
    """Logits, losses, selection and gradients of a training pass, over its micro-batches."""
    case = Case.read(folder)
    model = case.model(tmp_path).train()
    figures = case.figures("train")
    micro = figures.get("micro_batches", [figures])
    for i, part in enumerate(micro):
        suffix, names = ("", ("input_ids", "labels")) if len(micro) == 1 else (f".micro{i}", None)
        ids, labels = (case.tensors[n + suffix] for n in names or ("input_ids", "labels"))
        output = model(
            ids,
            labels=labels,
            num_items_in_batch=figures["num_items_in_batch"],
            step=their_step(case, model),
            return_logits=True,
            output_hidden_states=True,
        )
        share = (labels != -100).sum().item() / figures["num_items_in_batch"]
        theirs, ours = their_total(output, model.config, share)
        assert output.loss is not None and output.loss.item() == pytest.approx(ours.item(), rel=1e-6)
        assert theirs.item() == pytest.approx(sum(part["backward_losses"]), **LOSSES)
        close(output.logits, case.expected("train" + suffix, "logits"), "train.logits", **LOGITS)
        check_figures(case, part, output, model, share)
        if output.routing is not None:
            check_routing(case, "train", suffix, output, model.config)
        theirs.backward()
    compared = compare_parameters(model, case.gradients(), True, lambda a, b, name: close(a, b, name, **GRADIENTS))
    assert compared >= 5


@pytest.mark.parametrize("folder", select("abcd"))
def test_eval_pass(folder: Path, tmp_path: Path):
    """Logits, loss and selection of evaluation with the paper's top-k; the fused head agrees with the plain one."""
    case = Case.read(folder)
    model = case.model(tmp_path).eval()
    suffix = ".micro0" if "input_ids" not in case.tensors else ""
    ids, labels = case.tensors["input_ids" + suffix], case.tensors["labels" + suffix]
    with torch.no_grad():
        output = model(ids, labels=labels, routing_mode="topk", output_hidden_states=True)
        fused = model(ids, labels=labels, routing_mode="topk", return_logits=False)
    expected = case.expected("eval", "logits")
    if expected is None:
        expected = case.expected("train" + suffix, "logits")
    close(output.logits, expected, "eval.logits", **LOGITS)
    assert output.loss is not None and output.loss.item() == pytest.approx(
        case.figures("eval")["lm_loss_mean"], **LOSSES
    )
    assert fused.logits is None and fused.loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    if output.routing is not None and not suffix:
        check_routing(case, "eval", suffix, output, model.config)


@pytest.mark.parametrize("folder", [p for p in select("c") if "top_k_by_training_step" in Case.read(p.values[0]).info])
def test_capacity_warm_up(folder: Path, tmp_path: Path):
    """k per recursion at each training step of the capacity warm-up."""
    case = Case.read(folder)
    config, length = case.model(tmp_path).config, case.info["batch"]["seq_len"]
    for step, sizes in case.info["top_k_by_training_step"].items():
        factors = [factor_at(c, int(step), config.capacity_warmup_steps) for c in config.capacity_factors]
        assert [selection_size(c, length) for c in factors] == sizes


@pytest.mark.parametrize("folder", select("c"))
def test_selection_loss_per_recursion(folder: Path, tmp_path: Path):
    """The BCE of each recursion's router, where the router itself is trained by it."""
    case = Case.read(folder)
    model = case.model(tmp_path).train()
    suffix = ".micro0" if "input_ids" not in case.tensors else ""
    figures = case.figures("train")
    expected = figures.get("micro_batches", [figures])[0]["sampling_loss_per_recursion"]
    if model.config.selection != "aux_loss":
        assert model.config.selection == "none" or len(expected) == model.config.num_recursions
        return
    record = model(case.tensors["input_ids" + suffix], step=their_step(case, model)).routing
    before = torch.arange(record.depth.shape[1]).expand_as(record.depth)
    for r, value in enumerate(expected):
        chosen = (before[:, :, None] == record.selected[r][:, None, :]).any(-1)
        assert selection_loss(record.scores[r], chosen, None).item() == pytest.approx(value, **LOSSES)
        before = record.selected[r]


@pytest.mark.parametrize("folder", [p for p in select("d") if "train.topk_scores" in Case.read(p.values[0]).tensors])
def test_token_choice_scores(folder: Path, tmp_path: Path):
    """What the depth is chosen by: scaled scores plus the bias."""
    case = Case.read(folder)
    model = case.model(tmp_path).eval()
    with torch.no_grad():
        record = model(case.tensors["input_ids"]).routing
    scores = depth_scores(record.scores[0], model.config.router_activation, model.config.router_alpha)
    bias = model.model.router_bias
    close(scores if bias is None else scores + bias, case.expected("eval", "topk_scores"), "topk_scores", **LOGITS)


# Initialisation from a vanilla model, relaxation ----------------------------------------------------------------------


@pytest.mark.parametrize("folder", [p for p in select("e") if "maps" in Case.read(p.values[0]).info])
def test_initialisation_maps(folder: Path):
    """Which source layers start each depth, and which depths share a layer."""
    maps = Case.read(folder).info["maps"]
    for key, expected in maps.items():
        match = re.match(r"L(\d+)\.(\w+)\.nr(\d+)(?:_base_depth\d+)?\.(\w+)", key)
        assert match is not None
        source, sharing, recursions, strategy = int(match[1]), match[2], int(match[3]), match[4]
        depth = expected["effective_layers"]
        config = MoRConfig(num_hidden_layers=depth, num_recursions=recursions, sharing=sharing)
        origins = source_layers(source, config, strategy)
        uses = applications(config)
        assert [origins[use.layer] for use in uses] == expected["source_layers"], key
        layers = [layer_index(d, depth, recursions, sharing) for d in range(depth)]
        assert [layers.index(layer) for layer in layers] == expected["weight_owner"], key


@pytest.mark.parametrize("folder", [p for p in select("e") if "logits.pretrained" in Case.read(p.values[0]).tensors])
def test_models_started_from_a_vanilla_one(folder: Path, tmp_path: Path):
    """Logits of the recursive model that each initialisation builds."""
    case = Case.read(folder)
    vanilla = case.model(tmp_path).eval()
    ids, checked = case.tensors["input_ids"], 0
    with torch.no_grad():
        close(vanilla(ids).logits, case.tensors["logits.pretrained"], "pretrained", **LOGITS)
        for name, expected in case.prefixed("logits.").items():
            if name == "pretrained":
                continue
            strategy, sharing, recursions = name.split(".")
            nr, ends = int(recursions.removeprefix("nr")), 2 if sharing.startswith("middle_") else 0
            depth = (vanilla.config.num_hidden_layers - ends) // nr * nr + ends
            changes = {"num_recursions": nr, "sharing": sharing, "num_hidden_layers": depth}
            model = from_vanilla(vanilla, MoRConfig(**(vanilla.config.to_diff_dict() | changes)), strategy).eval()
            close(model(ids).logits, expected, name, **LOGITS)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("folder", [p for p in select("e") if "relaxation" in Case.read(p.values[0]).info])
def test_relaxation(folder: Path, tmp_path: Path):
    """Logits, loss and gradients with per-depth deltas or recursion encodings."""
    case = Case.read(folder)
    model = case.model(tmp_path).eval()
    ids, labels = case.tensors["input_ids"], case.tensors["labels"]
    with torch.no_grad():
        close(model(ids).logits, case.expected("eval", "logits"), "eval.logits", **LOGITS)
    output = model.train()(ids, labels=labels)
    assert output.loss.item() == pytest.approx(case.info["train"]["lm_loss_mean"], **LOSSES)
    output.loss.backward()
    assert compare_parameters(model, case.gradients(), True, lambda a, b, name: close(a, b, name, **GRADIENTS)) >= 3


# Optimizer steps ------------------------------------------------------------------------------------------------------


def optimizers(case: Case, model: MoRForCausalLM) -> list[torch.optim.AdamW]:
    """Their AdamW, and for an auxiliary router a second one at ten times the rate."""
    trainer, decayed = case.info["trainer"], set()
    compared: dict[str, torch.Tensor] = dict.fromkeys(trainer["weight_decay_param_names"], torch.zeros(()))
    pointers = {p.data_ptr(): n for n, p in model.named_parameters()}
    compare_parameters(model, compared, False, lambda ours, _, name: decayed.add(pointers.get(ours.data_ptr())))
    groups: list[dict] = [{"params": [], "weight_decay": trainer["weight_decay"]}, {"params": [], "weight_decay": 0.0}]
    auxiliary = [p for n, p in model.named_parameters() if "aux_routers" in n]
    for name, parameter in model.named_parameters():
        if "aux_routers" not in name:
            groups[0 if name in decayed else 1]["params"].append(parameter)
    settings = {"betas": (trainer["adam_beta1"], trainer["adam_beta2"]), "eps": trainer["adam_epsilon"]}
    result = [torch.optim.AdamW(groups, lr=0.0, **settings)]
    if auxiliary:
        result.append(torch.optim.AdamW(auxiliary, lr=0.0, weight_decay=trainer["weight_decay"], **settings))
    return result


@pytest.mark.parametrize("folder", select("f"))
def test_optimizer_steps(folder: Path, tmp_path: Path):
    """Losses, gradient norms, router bias and final parameters over a few steps of their training loop."""
    case = Case.read(folder)
    model = case.model(tmp_path).train()
    trainer, config = case.info["trainer"], model.config
    steps, accumulation, size = (
        trainer["max_steps"],
        trainer["gradient_accumulation_steps"],
        trainer["micro_batch_size"],
    )
    all_optimizers = optimizers(case, model)
    micro = iter(zip(case.info["micro_batches"], case.tensors["input_ids"].split(size), strict=True))
    losses = []
    for step in range(steps):
        load = torch.zeros(config.num_recursions)
        for _ in range(accumulation):
            figures, ids = next(micro)
            output = model(ids, labels=ids, num_items_in_batch=figures["num_items_in_batch"], step=step + 1)
            assert output.losses["lm"].item() == pytest.approx(figures["lm_loss"], rel=2e-5)
            total, _ = their_total(output, config, ids.numel() / figures["num_items_in_batch"])
            losses.append(total.item())
            total.backward()
            if output.routing is not None:
                load += output.routing.load / accumulation
        rates = case.info["learning_rates_used_per_step"][step]
        for i, optimizer in enumerate(all_optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, trainer["max_grad_norm"])
            if i == 0:
                assert norm.item() == pytest.approx(case.info["log_history"][step]["grad_norm"], rel=1e-4)
            for group in optimizer.param_groups:
                group["lr"] = rates[i] if i < len(rates) else rates[0] * 10
            optimizer.step()
            optimizer.zero_grad()
        model.update_router_bias(load)
        expected_bias = case.info.get("router_bias_after_each_step")
        if expected_bias:
            assert model.model.router_bias.tolist() == pytest.approx(expected_bias[step], abs=1e-7)
    if config.selection != "aux_router":
        assert losses == pytest.approx(case.info["backward_losses"], rel=2e-5)
    final = case.prefixed("final.")
    assert compare_parameters(model, final, False, lambda a, b, name: close(a, b, name, rtol=1e-4, atol=2e-5)) >= 5
