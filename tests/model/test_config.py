"""Impossible configurations are refused with the field's name and a value that works; possible ones round-trip."""

from __future__ import annotations

import pytest

from model.config import MoRConfig
from model.depth import METHODS, all_settings, refuse_foreign

MOR = {"num_recursions": 3, "routing": "expert_choice"}
TOKEN = {"num_recursions": 3, "routing": "token_choice"}

REFUSED = [
    ({"num_recursions": 3, "num_hidden_layers": 30}, "num_hidden_layers: 30", "use 32"),
    ({"num_recursions": 3, "num_hidden_layers": 7, "sharing": "cycle"}, "num_hidden_layers: 7", "use 9"),
    ({"num_recursions": 4, "num_hidden_layers": 4}, "num_hidden_layers: 4", "use 6"),
    ({"num_recursions": 0}, "num_recursions", "at least 1"),
    ({"routing": "expert_choice"}, "num_recursions", "use 2"),
    (MOR | {"sharing": "middle_sequence"}, "sharing", "use 'middle_cycle' or 'cycle'"),
    ({"num_attention_heads": 7}, "num_attention_heads: 7", "use 6"),
    ({"num_key_value_heads": 4}, "num_key_value_heads: 4", "use 3"),
    ({"kv_strategy": "shared"}, "kv_strategy", "use 'recursion_wise'"),
    ({"num_recursions": 3, "kv_strategy": "shared_update"}, "kv_strategy", "use 'shared'"),
    ({"num_recursions": 3, "kv_strategy": "propagated"}, "kv_strategy", "use 'recursion_wise'"),
    ({"relaxation": "lora"}, "relaxation", "use 'none'"),
    (MOR | {"router_activation": "softmax"}, "router_activation", "'sigmoid', 'tanh', 'none'"),
    (TOKEN | {"router_activation": "tanh"}, "router_activation", "'softmax', 'sigmoid'"),
    (MOR | {"router_temperature": 0.0}, "router_temperature", "use 1.0"),
    (MOR | {"capacity_factors": [1.0, 0.5]}, "capacity_factors: 2 values", "use [1.0, 0.6667, 0.3333]"),
    (MOR | {"capacity_factors": [1.0, 0.5, 0.0]}, "capacity_factors", "(0, 1]"),
    (MOR | {"capacity_factors": [1.0, 0.3, 0.5]}, "capacity_factors", "use [1.0, 0.5, 0.3]"),
    ({"num_recursions": 3, "relaxation": "lora", "lora_rank": 0}, "lora_rank", "use 16"),
    ({"num_recursions": 3, "relaxation": "dora", "lora_targets": ["qkv"]}, "lora_targets", "q_proj"),
]


@pytest.mark.parametrize(
    ("changes", "field", "works"), REFUSED, ids=[f"{i}-{field}" for i, (_, field, _) in enumerate(REFUSED)]
)
def test_impossible_configuration_names_field_and_remedy(changes, field, works):
    with pytest.raises(ValueError) as caught:
        MoRConfig(**changes)
    assert field in str(caught.value) and works in str(caught.value)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_setting_of_another_method_is_refused_by_name(method):
    own = {name: setting.default for name, setting in method.settings.items()}
    refuse_foreign({"routing": method.name, "hidden_size": 64, **own})
    foreign = all_settings().keys() - own.keys()
    assert foreign
    for name in foreign:
        with pytest.raises(ValueError, match=rf"^{name}: means nothing for routing '{method.name}', only for "):
            refuse_foreign({"routing": method.name, name: all_settings()[name].default or 1})


@pytest.mark.parametrize("depth", range(3, 40))
def test_the_depth_that_the_message_names_works(depth):
    for sharing in ("cycle", "middle_cycle", "sequence", "middle_sequence"):
        for recursions in (2, 3, 4):
            try:
                MoRConfig(num_hidden_layers=depth, num_recursions=recursions, sharing=sharing)
            except ValueError as error:
                works = int(str(error).split("use ")[1].split(",")[0])
                assert depth < works < depth + 5
                MoRConfig(num_hidden_layers=works, num_recursions=recursions, sharing=sharing)


@pytest.mark.parametrize(
    ("changes", "activation", "alpha", "capacities", "architecture"),
    [
        ({}, "sigmoid", 0.1, None, "vanilla"),
        ({"num_recursions": 3}, "sigmoid", 0.1, None, "recursive"),
        (MOR, "sigmoid", 0.1, [1.0, 2 / 3, 1 / 3], "mor_expert"),
        (TOKEN, "softmax", 1.0, None, "mor_token"),
        (MOR | {"router_alpha": 0.5, "router_activation": "tanh"}, "tanh", 0.5, [1.0, 2 / 3, 1 / 3], "mor_expert"),
    ],
)
def test_defaults_are_resolved_and_survive_a_round_trip(tmp_path, changes, activation, alpha, capacities, architecture):
    config = MoRConfig(**changes)
    config.save_pretrained(tmp_path)
    for got in (config, MoRConfig.from_pretrained(tmp_path)):
        assert (got.router_activation, got.router_alpha, got.architecture) == (activation, alpha, architecture)
        assert got.capacity_factors == capacities
        assert got.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(("field", "value"), [("routing", "both"), ("num_recursions", "three"), ("sharing", "spiral")])
def test_values_of_the_wrong_kind_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        MoRConfig(**{field: value})
