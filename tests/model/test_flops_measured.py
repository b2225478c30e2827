"""The accountant against torch's own counter: equal integers for a real forward and backward pass of every model."""

import dataclasses

import pytest
import torch

from model.config import MoRConfig
from model.flops import Work, breakdown, dora_norm_flops, expected_work, measured_flops, unique_parameters, work_of
from model.modeling import MoRForCausalLM

BATCH, LENGTH = 2, 14
KV = ("recursion_wise", "shared", "shared_update")
EXPERT, TOKEN = {"num_recursions": 3, "routing": "expert_choice"}, {"num_recursions": 3, "routing": "token_choice"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECURSIVE = {"num_recursions": 3}
SEQUENCE = RECURSIVE | {"sharing": "middle_sequence"}
CYCLE = {"sharing": "cycle", "num_hidden_layers": 3}
ROUTERS = ("linear", "mlp", "wide_mlp", "random")
CASES: list[dict] = [
    {},
    {"num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 10},
    *(fields | {"kv_strategy": kv} for fields in (RECURSIVE, SEQUENCE, RECURSIVE | CYCLE) for kv in KV[:2]),
    SEQUENCE | {"sharing": "sequence", "num_hidden_layers": 3, "kv_strategy": "shared"},
    RECURSIVE | {"share_norms": False},
    *(routed | {"kv_strategy": kv, "router": name} for routed in (EXPERT, TOKEN) for kv in KV for name in ROUTERS),
    *(EXPERT | {"selection": "aux_router", "router": name} for name in ("linear", "mlp")),
    EXPERT | {"selection": "none", "gating": "additive"},
    *(EXPERT | {"kv_strategy": kv, "capacity_factors": [0.8, 0.5, 0.2]} for kv in KV),
    EXPERT | CYCLE | {"z_loss_coefficient": 0.1},
    TOKEN | {"router_activation": "sigmoid", "balancing": "loss_free", "gating": "additive"},
    TOKEN | CYCLE | {"balancing": "loss_free"},
    *(EXPERT | {"relaxation": kind, "lora_targets": PROJECTIONS, "lora_rank": 3} for kind in ("lora", "dora")),
    TOKEN | {"relaxation": "dora", "lora_dropout": 0.1},
    *(fields | {"relaxation": "recursion_encoding"} for fields in (EXPERT, SEQUENCE)),
]


def build(fields: dict) -> MoRForCausalLM:
    base = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MoRForCausalLM(MoRConfig(**base | fields)).train()


def executed(config: MoRConfig, record) -> Work:
    """The work of a forward pass from its routing, with attention over the slots to which ragged rows are padded."""
    if config.routing == "none":
        return expected_work(config, LENGTH, BATCH)
    work = work_of(config, LENGTH, BATCH, record.counts.sum(0).tolist(), record.pairs.sum(0).tolist())
    if config.routing == "expert_choice":
        return work
    padded = [work.passes[0]]
    for passed, slots in zip(work.passes[1:], record.counts.amax(0).tolist(), strict=True):
        keys = slots if config.kv_strategy == "recursion_wise" else LENGTH
        padded.append(dataclasses.replace(passed, dense=BATCH * slots * keys))
    return dataclasses.replace(work, passes=tuple(padded))


def step_of(model: MoRForCausalLM, records: list):
    tokens = torch.randint(0, 97, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))

    def step():
        output = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:])
        output.loss.backward()
        records.append(output.routing)

    return step


@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(map(str, f.values())) or "vanilla")
def test_counted_flops_and_parameters_equal_the_measured(fields):
    model, records = build(fields), []
    assert unique_parameters(model.config) == sum(p.numel() for p in model.parameters())
    measured = measured_flops(step_of(model, records))
    parts = breakdown(model.config, executed(model.config, records[0]), attention="full")
    assert sum(part.forward + part.backward for part in parts.values()) + dora_norm_flops(model.config) == measured


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "recursion", "selective"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_recursions": 3, "sharing": "middle_sequence"},
        EXPERT | {"kv_strategy": "shared"},
        TOKEN,
        EXPERT | {"relaxation": "lora", "lora_targets": PROJECTIONS, "lora_rank": 3},
        EXPERT | {"relaxation": "recursion_encoding"},
    ],
)
def test_counted_recomputation_equals_the_measured(fields, policy):
    model, records = build(fields), []
    plain = measured_flops(step_of(model, records))
    model.set_recompute(policy)
    parts = breakdown(model.config, executed(model.config, records[0]), attention="full", recompute=policy)
    assert sum(part.recompute for part in parts.values()) == measured_flops(step_of(model, records)) - plain


def test_counted_per_batch_flops_are_those_of_the_expected_routing_for_expert_choice():
    model, records = build(EXPERT), []
    step_of(model, records)()
    assert executed(model.config, records[0]) == expected_work(model.config, LENGTH, BATCH)
