"""The accountant against torch's own counter: equal integers for a real forward and backward pass of every model."""

import dataclasses

import pytest
import torch

from model.config import MoRConfig
from model.depth import method_of
from model.flops import Work, breakdown, dora_norm_flops, expected_work, measured_flops, unique_parameters, work_of
from model.modeling import MoRForCausalLM
from tests.helpers.variants import COUNTED, EXIT, EXPERT, MOD, PROJECTIONS, PROPAGATED, TOKEN, UT

BATCH, LENGTH = 2, 14


def build(fields: dict) -> MoRForCausalLM:
    base = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MoRForCausalLM(MoRConfig(**base | fields)).train()
    for name, parameter in model.named_parameters():
        if name.endswith("halt.weight"):  # so that tokens halt at different steps
            torch.nn.init.normal_(parameter, std=3.0)
    return model


def executed(config: MoRConfig, record, ragged: bool = False) -> Work:
    """The work of a forward pass from its routing, with attention over the slots to which ragged rows are padded."""
    if config.routing == "none":
        return expected_work(config, LENGTH, BATCH)
    work = work_of(
        config,
        LENGTH,
        BATCH,
        record.counts.sum(0).tolist(),
        record.pairs.sum(0).tolist(),
        record.offered.sum(0).tolist(),
        record.heads,
    )
    if method_of(config).fixed and not ragged:
        return work
    slots = record.counts.amax(0).tolist()
    padded = []
    for passed in work.passes:
        gate, keys = passed.stage.gate, LENGTH
        if gate is not None:
            keys = LENGTH if passed.stage.sees_all else slots[gate]
            passed = dataclasses.replace(passed, dense=BATCH * slots[gate] * keys)
        padded.append(passed)
    return dataclasses.replace(work, passes=tuple(padded))


def step_of(model: MoRForCausalLM, records: list):
    tokens = torch.randint(0, 97, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))

    def step():
        output = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:])
        output.loss.backward()
        records.append(output.routing)

    return step


@pytest.mark.parametrize("fields", COUNTED, ids=lambda f: "-".join(map(str, f.values())) or "vanilla")
def test_counted_flops_and_parameters_equal_the_measured(fields):
    model, records = build(fields), []
    assert unique_parameters(model.config) == sum(p.numel() for p in model.parameters())
    measured = measured_flops(step_of(model, records))
    parts = breakdown(model.config, executed(model.config, records[0]), attention="full")
    assert sum(part.forward + part.backward for part in parts.values()) + dora_norm_flops(model.config) == measured


PREDICTED = MOD | {"selection": "predictor"}
EVALUATED = [{}, EXPERT, EXPERT | {"kv_strategy": "shared"}, EXPERT | PROPAGATED, TOKEN, TOKEN | PROPAGATED, MOD]
EVALUATED += [PREDICTED, *(UT | {"act_combine": combine} for combine in ("accumulated", "basic", "frozen"))]


@pytest.mark.parametrize("fields", EVALUATED, ids=lambda f: "-".join(map(str, f.values())) or "vanilla")
def test_counted_flops_of_evaluation_equal_the_measured(fields):
    """Without looking ahead, where every selection is ragged."""
    model, records = build(fields).eval(), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "predictor" in name:  # so that some tokens enter and some do not
                parameter.mul_(50.0)
        tokens = torch.randint(0, 97, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        measured = measured_flops(lambda: records.append(model(tokens[:, :-1], targets=tokens[:, 1:]).routing))
    work = executed(model.config, records[0], ragged=True)
    assert sum(part.forward for part in breakdown(model.config, work, attention="full").values()) == measured


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "recursion", "selective"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_recursions": 3, "sharing": "middle_sequence"},
        EXPERT | {"kv_strategy": "shared"},
        TOKEN,
        EXPERT | {"relaxation": "lora", "lora_targets": list(PROJECTIONS), "lora_rank": 3},
        EXPERT | {"relaxation": "recursion_encoding"},
    ],
)
def test_counted_recomputation_equals_the_measured(fields, policy):
    model, records = build(fields), []
    plain = measured_flops(step_of(model, records))
    model.set_recompute(policy)
    parts = breakdown(model.config, executed(model.config, records[0]), attention="full", recompute=policy)
    assert sum(part.recompute for part in parts.values()) == measured_flops(step_of(model, records)) - plain


@pytest.mark.parametrize("combine", ["accumulated", "basic"])
def test_steps_that_no_token_of_the_batch_needs_are_neither_run_nor_counted(combine):
    """All halt at the first of three steps: one token stands in at the others, so that every rank runs every module."""
    model, records = build(UT | {"act_combine": combine}), []
    torch.nn.init.constant_(model.model.depth.halt.bias, 100.0)
    measured = measured_flops(step_of(model, records))
    assert records[0].counts.sum(0).tolist() == [BATCH * LENGTH, 0, 0]
    work = executed(model.config, records[0])
    stand_in = [
        dataclasses.replace(p, queries=1, keys=1, dense=BATCH) if p.stage.gate else p for p in work.passes
    ]  # a slot in each row
    offered = [BATCH * LENGTH, BATCH * LENGTH, 1]
    assert work.offered == (BATCH * LENGTH, BATCH * LENGTH, 0)
    work = dataclasses.replace(work, passes=tuple(stand_in), offered=tuple(offered))
    parts = breakdown(model.config, work, attention="full")
    assert sum(part.forward + part.backward for part in parts.values()) == measured


def test_counted_per_batch_flops_are_those_of_the_expected_routing_for_expert_choice():
    model, records = build(EXPERT), []
    step_of(model, records)()
    assert executed(model.config, records[0]) == expected_work(model.config, LENGTH, BATCH)


@pytest.mark.parametrize(
    ("measure", "threshold"), [("softmax", 0.0027), ("state", 0.985), ("classifier", 0.5), ("kl", 0.00015)]
)
def test_counted_flops_of_exits_equal_the_measured_in_evaluation(measure, threshold):
    """Decoding's rule over a text: checks by the head, the classifier, and queries of those alone who go on."""
    fields = {"num_hidden_layers": 5, "exit_measure": measure, "exit_threshold": threshold, "exit_first": 3}
    model = build(EXIT | fields).eval()
    if measure == "classifier":
        torch.nn.init.normal_(model.model.depth.classifier_weight, generator=torch.Generator().manual_seed(4))
    tokens, records = torch.randint(0, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)), []
    with torch.no_grad():
        measured = measured_flops(lambda: records.append(model(tokens).routing))
    depths = records[0].depth.unique().tolist()
    assert len(depths) > 1 and min(depths) == 1  # some leave, none before layer 3
    parts = breakdown(model.config, executed(model.config, records[0]), attention="full")
    assert sum(part.forward for part in parts.values()) == measured
