"""The variants that property tests run over: one table, name -> fields of the configuration.

A new way of spending depth adds its rows here, and its names to the groups below it; every law then holds it.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

KV_STRATEGIES = ("recursion_wise", "shared", "shared_update")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECURSIVE: Fields = {"num_recursions": 3}
EXPERT: Fields = RECURSIVE | {"routing": "expert_choice"}
TOKEN: Fields = RECURSIVE | {"routing": "token_choice"}
CYCLE: Fields = {"sharing": "cycle", "num_hidden_layers": 6}
FALLING: Fields = {"capacity_factors": [0.8, 0.5, 0.3]}
MOD: Fields = {"routing": "mixture_of_depths", "routed_capacity": 0.4}
UT: Fields = RECURSIVE | {"routing": "universal", "act_bias": 0.0}
EXIT: Fields = {"routing": "early_exit", "num_hidden_layers": 6, "exit_layers": [1, 3, 4]}
TRAINED: Fields = {"z_loss_coefficient": 1e-3}

VARIANTS: dict[str, Fields] = {
    "vanilla": {},
    "recursive": RECURSIVE,
    "recursive-norms": RECURSIVE | {"share_norms": False},
    "recursive-encoding": RECURSIVE | {"relaxation": "recursion_encoding"},
    "recursive-cycle-shared": RECURSIVE | {"kv_strategy": "shared"},
    "recursive-shared": RECURSIVE | {"kv_strategy": "shared", "sharing": "middle_sequence"},
    **{f"expert-{kv}": EXPERT | {"kv_strategy": kv} for kv in KV_STRATEGIES},
    **{
        f"expert-aux-{kv}": EXPERT
        | CYCLE
        | {"kv_strategy": kv, "selection": "aux_router", "capacity_factors": [0.8, 0.6, 0.4]}
        for kv in KV_STRATEGIES
    },
    **{f"token-{kv}": TOKEN | {"kv_strategy": kv} for kv in KV_STRATEGIES},
    "expert-random": EXPERT | {"router": "random"},
    "expert-lora": EXPERT | {"num_recursions": 2, "relaxation": "lora", "lora_rank": 4},
    "expert-norms": EXPERT | {"num_recursions": 2, "share_norms": False},
    "expert-cycle": EXPERT | CYCLE | FALLING,
    "expert-aux-mlp": EXPERT | {"selection": "aux_router", "router": "mlp"},
    "expert-shared-falling": EXPERT | FALLING | {"kv_strategy": "shared"},
    "expert-z": EXPERT | TRAINED,
    "expert-z-update": EXPERT
    | TRAINED
    | {"kv_strategy": "shared_update", "selection": "aux_router", "router": "wide_mlp"},
    "expert-z-lora": EXPERT | TRAINED | {"relaxation": "lora", "lora_rank": 2, "lora_dropout": 0.1},
    "token-encoding": TOKEN | {"num_recursions": 2, "relaxation": "recursion_encoding"},
    "token-free-update": TOKEN | {"kv_strategy": "shared_update", "balancing": "loss_free"},
    "token-sigmoid": TOKEN | {"router_activation": "sigmoid", "gating": "additive"},
    "token-z": TOKEN | TRAINED,
    "token-z-shared": TOKEN
    | TRAINED
    | {"kv_strategy": "shared", "balancing": "loss_free", "relaxation": "dora", "lora_rank": 2},
}

VARIANTS |= {
    "mod": MOD,
    "mod-predictor": MOD | {"selection": "predictor", "residual": "block", "router_activation": "none"},
    "mod-random": MOD | {"router": "random"},
    "mod-z": MOD | TRAINED,
    "ut": UT,
    "ut-basic": UT | {"act_combine": "basic"},
    "ut-frozen": UT | {"act_combine": "frozen"},
    "ut-frozen-cycle": UT | CYCLE | {"act_combine": "frozen"},
    "exit": EXIT | {"exit_threshold": 0.04},
    "exit-state": EXIT | {"exit_measure": "state", "exit_threshold": 0.5, "exit_rotation": 2},
    "exit-recursive": RECURSIVE
    | {"routing": "early_exit", "exit_threshold": 0.02, "exit_decay": "paper", "exit_decay_length": 8},
    "exit-classifier": RECURSIVE | {"routing": "early_exit", "exit_measure": "classifier", "exit_threshold": 0.5},
    "exit-latent": EXIT | {"exit_measure": "latent", "exit_threshold": 0.5},
    "exit-dropout": EXIT | {"exit_measure": "kl", "exit_rotation": 3, "layer_dropout": 0.3},
}
PROPAGATED: Fields = {"kv_strategy": "propagated"}
VARIANTS |= {
    "expert-propagated": EXPERT | PROPAGATED | CYCLE | FALLING | TRAINED,
    "expert-aux-propagated": EXPERT | PROPAGATED | {"selection": "aux_router", "relaxation": "lora", "lora_rank": 2},
    "token-propagated": TOKEN | PROPAGATED | {"balancing": "loss_free"},
}
NEW = ["expert-propagated", "token-propagated", "mod", "mod-predictor", "ut", "ut-basic", "ut-frozen"]
NEW += ["exit", "exit-state", "exit-recursive"]

# Laws of generation: cache, engine, `generate`.
GENERATING = [
    "vanilla",
    "recursive",
    "recursive-shared",
    *(f"{kind}-{kv}" for kind in ("expert", "expert-aux", "token") for kv in KV_STRATEGIES),
    "expert-random",
    "expert-lora",
    "token-encoding",
    "expert-norms",
    *NEW,
    "mod-random",
    "ut-frozen-cycle",
    "exit-classifier",
    "exit-latent",
    "exit-dropout",
    "expert-aux-propagated",
]
# Laws of what a token may see: later tokens, padding, documents.
SEEING = [
    "vanilla",
    "recursive",
    "recursive-cycle-shared",
    "expert-recursion_wise",
    "expert-cycle",
    "expert-aux-mlp",
    "expert-shared-falling",
    "expert-shared_update",
    "expert-random",
    "token-recursion_wise",
    "token-shared",
    "token-free-update",
    "token-sigmoid",
    *NEW,
    "mod-random",
    "ut-frozen-cycle",
    "exit-classifier",
    "exit-latent",
    "expert-aux-propagated",
]
# Those that run as many steps as some token of the batch needs, so that a row's count hangs on the others.
BY_BATCH = ["ut", "ut-basic"]
# Laws of training: recomputation, accumulation, saving.
TRAINING = [
    "vanilla",
    "recursive-norms",
    "recursive-encoding",
    "recursive-shared",
    "expert-z",
    "expert-z-update",
    "expert-z-lora",
    "token-z",
    "token-z-shared",
    "mod-z",
    "mod-predictor",
    "ut",
    "ut-frozen",
    "exit-state",
    "exit-recursive",
    "exit-dropout",
    "expert-propagated",
    "token-propagated",
]
ROUTED = [name for name, fields in VARIANTS.items() if fields.get("routing", "none") != "none"]


def _counted() -> list[Fields]:
    cycle = {"sharing": "cycle", "num_hidden_layers": 3}
    sequence = RECURSIVE | {"sharing": "middle_sequence"}
    routers = ("linear", "mlp", "wide_mlp", "random")
    routed = (EXPERT, TOKEN)
    return [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 10},
        *(f | {"kv_strategy": kv} for f in (RECURSIVE, sequence, RECURSIVE | cycle) for kv in KV_STRATEGIES[:2]),
        sequence | {"sharing": "sequence", "num_hidden_layers": 3, "kv_strategy": "shared"},
        RECURSIVE | {"share_norms": False},
        *(f | {"kv_strategy": kv, "router": name} for f in routed for kv in KV_STRATEGIES for name in routers),
        *(EXPERT | {"selection": "aux_router", "router": name} for name in ("linear", "mlp")),
        EXPERT | {"selection": "none", "gating": "additive"},
        *(EXPERT | {"kv_strategy": kv, "capacity_factors": [0.8, 0.5, 0.2]} for kv in KV_STRATEGIES),
        EXPERT | cycle | {"z_loss_coefficient": 0.1},
        *(f | PROPAGATED for f in (EXPERT, TOKEN, EXPERT | cycle | {"capacity_factors": [0.8, 0.5, 0.2]})),
        TOKEN | {"router_activation": "sigmoid", "balancing": "loss_free", "gating": "additive"},
        TOKEN | cycle | {"balancing": "loss_free"},
        *(
            EXPERT | {"relaxation": kind, "lora_targets": list(PROJECTIONS), "lora_rank": 3}
            for kind in ("lora", "dora")
        ),
        TOKEN | {"relaxation": "dora", "lora_dropout": 0.1},
        *(f | {"relaxation": "recursion_encoding"} for f in (EXPERT, sequence)),
        *(MOD | fields for fields in ({}, {"selection": "predictor"}, {"router": "random"}, {"routed_every": 3})),
        *(UT | {"act_combine": combine} for combine in ("accumulated", "basic", "frozen")),
        EXIT | {"num_hidden_layers": 5},
        EXIT | {"num_hidden_layers": 5, "exit_rotation": 2, "exit_weights": "sum", "exit_scale": 0.2},
        *(f | {"routing": "early_exit"} for f in (RECURSIVE, RECURSIVE | cycle)),
        EXIT | {"num_hidden_layers": 5, "exit_measure": "classifier", "layer_dropout": 0.4},
        RECURSIVE | {"routing": "early_exit", "relaxation": "lora", "lora_rank": 3},
    ]


# Fields of the models whose FLOPs are held against torch's counter.
COUNTED = _counted()
