"""Turn a checkpoint of the paper's authors' code into a folder that `from_pretrained` loads.

    python -m model.convert.reference --state-dict FILE --config FILE --output DIR

FILE of the state dict: `.safetensors`, or a torch file of tensors. FILE of the configuration: JSON (or YAML) with their
sections `model` (Llama's fields), `recursive`, `kv_sharing`, `relaxation`, `mor`; the last both nested as in their YAML
files and flat.

Their naming, with D layers in a block: a plain or recursive model keeps every depth under `model.layers.<depth>`;
expert-choice wraps recursion r as `model.layers.<start + r>.block.<0..D-1>` with its own router, token-choice wraps all
as `model.layers.<start>.block_list.<r>.<0..D-1>`, and PEFT prefixes `base_model.model.`. A shared tensor may stand
under one of its names or under all; names that should agree and do not are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ..config import MoRConfig
from ..modeling import MoRForCausalLM
from ..sharing import applications

_ROUTINGS = {"expert": "expert_choice", "token": "token_choice"}


class ImportFailure(ValueError):
    """The checkpoint or its configuration cannot be imported: one message that names the key or field."""


def reference_config(theirs: Mapping[str, Any]) -> MoRConfig:
    """Build a `MoRConfig` from the authors' configuration. Raises ImportFailure or ValueError naming the field."""
    if not isinstance(theirs.get("model"), Mapping):
        raise ImportFailure("model: expected a section with Llama's fields (hidden_size, num_hidden_layers, ...)")
    fields = dict(theirs["model"])
    depth = fields.pop("effective_num_hidden_layers", None)
    if depth is not None:
        fields["num_hidden_layers"] = depth
    rope = fields.pop("rope_theta", None)
    if rope is not None:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": rope}
    recursive = theirs.get("recursive") or {}
    if recursive.get("enable", bool(recursive)):
        fields["num_recursions"] = recursive["num_recursion"]
        fields["sharing"] = recursive["sharing"]
        fields["share_norms"] = recursive.get("ln_share", True)
    kv = theirs.get("kv_sharing") or {}
    if kv.get("enable"):
        fields["kv_strategy"] = "shared_update" if kv.get("update_cache") else "shared"
    mor = theirs.get("mor") or {}
    if mor.get("enable", bool(mor)):
        fields |= _routing_fields(mor)
    relaxation = theirs.get("relaxation") or {}
    if relaxation.get("enable"):
        fields |= _relaxation_fields(relaxation)
    return MoRConfig(**fields)


def _routing_fields(mor: Mapping[str, Any]) -> dict[str, Any]:
    kind = mor.get("type")
    if kind not in _ROUTINGS:
        raise ImportFailure(f"mor.type: expected 'expert' or 'token', got {kind!r}")
    own = {**mor, **(mor.get(kind) or {})}
    fields: dict[str, Any] = {
        "routing": _ROUTINGS[kind],
        "router": "random" if own.get("rand_router") else own.get("router_type", "linear"),
        "router_temperature": own.get("router_temperature", own.get("temp", 1.0)),
        "router_activation": own.get("router_func") or ("none" if kind == "expert" else "softmax"),
        "router_alpha": own.get("alpha"),
        "gating": own.get("gating", "weighted"),
        "z_loss_coefficient": (own.get("z_coeff") or 0.0) if own.get("z_loss") else 0.0,
    }
    if kind == "expert":
        capacity = own.get("capacity")
        if isinstance(capacity, str):
            capacity = [float(part) for part in capacity.split(",")]
        fields |= {
            "capacity_factors": capacity,
            "capacity_warmup_steps": own.get("cap_warmup_step") or 0,
            "selection": own.get("sampling") or "none",
            "selection_coefficient": own.get("sampling_coeff", own.get("coeff")) or 0.0,
        }
        return fields
    return fields | {
        "balancing": own.get("balancing") or "none",
        "balancing_coefficient": own.get("balancing_coeff", own.get("coeff")) or 0.0,
        "bias_update_rate": own.get("bias_update_rate", own.get("u")) or 0.0,
        # Their counter starts at 1 and their test is "below", so that w there is w - 1 forced steps.
        "balancing_warmup_steps": max(0, (own.get("bal_warmup_step") or 0) - 1),
    }


def _relaxation_fields(relaxation: Mapping[str, Any]) -> dict[str, Any]:
    method = relaxation.get("method")
    if method == "recursion_encoding":
        return {"relaxation": method}
    if method not in ("lora", "dora"):
        raise ImportFailure(f"relaxation.method: expected lora, dora or recursion_encoding, got {method!r}")
    lora = relaxation["lora"]
    if lora.get("rank_pattern"):
        raise ImportFailure("relaxation.lora.rank_pattern: one rank for all projections is supported; leave it null")
    pattern = lora.get("alpha_pattern")
    return {
        "relaxation": method,
        "lora_rank": lora["r"],
        "lora_alpha": float(lora["r"] * pattern if pattern else lora["alpha"]),
        "lora_dropout": lora.get("dropout", 0.0),
        "lora_targets": list(lora["target_modules"]),
    }


class KeyMap:
    """From the authors' parameter names to this project's, for one configuration."""

    def __init__(self, config: MoRConfig):
        self.config = config
        self.uses = applications(config)
        self.start = 1 if config.sharing.startswith("middle_") else 0
        self.block = (config.num_hidden_layers - 2 * self.start) // config.num_recursions

    def __call__(self, name: str) -> tuple[str, int | None]:
        """(parameter, index in its first dimension or None). Raises ImportFailure where the depth does not exist."""
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", plain)
        if match is None:
            return plain, None
        wrapper, rest = int(match[1]), match[2]
        if rest == "router_bias":
            return "model.depth.router_bias", None
        if rest == "recursion_encoding":
            return "model.recursion_encoding", self.uses[wrapper].encoding
        router = re.fullmatch(r"(mor_router|mlp_router)\.router\.(?:(\d)\.)?weight", rest)
        if router:
            kind = "routers" if router[1] == "mor_router" else "aux_routers"
            weight = "hidden_weight" if router[2] == "0" else "weight"
            number = wrapper - self.start if self.config.routing == "expert_choice" else 0
            return f"model.depth.{kind}.{number}.{weight}", None
        depth, rest = self._depth(wrapper, rest)
        if not 0 <= depth < len(self.uses):
            raise ImportFailure(f"{name}: depth {depth} does not exist in a model of {len(self.uses)} effective layers")
        return self._parameter(depth, rest)

    def _depth(self, wrapper: int, rest: str) -> tuple[int, str]:
        """Effective depth and the rest of the name, without the wrappers of routing and of recursion encoding."""
        in_list = re.fullmatch(r"block_list\.(\d+)\.(\d+)\.(.+)", rest)
        if in_list:
            return self.start + int(in_list[1]) * self.block + int(in_list[2]), in_list[3]
        in_block = re.fullmatch(r"block\.(\d+)\.(.+)", rest)
        if in_block:
            return self.start + (wrapper - self.start) * self.block + int(in_block[1]), in_block[2]
        if self.config.routing != "none" and wrapper > 0:
            return self.config.num_hidden_layers - 1, rest
        return wrapper, rest.removeprefix("block.")

    def _parameter(self, depth: int, rest: str) -> tuple[str, int | None]:
        use = self.uses[depth]
        layer = f"model.layers.{use.layer}"
        adapter = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", rest)
        if adapter:
            kind = "lora_magnitude" if adapter[2] == "magnitude_vector" else f"lora_{adapter[2]}"
            return f"{layer}.{adapter[1]}.{kind}", use.recursion
        norm = re.fullmatch(r"(input_layernorm|post_attention_layernorm)\.weight", rest)
        if norm and use.recursion is not None and not self.config.share_norms:
            return f"{layer}.{norm[1]}.{use.recursion}.weight", None
        return f"{layer}.{rest}", None


def reference_state(theirs: Mapping[str, Tensor], model: MoRForCausalLM) -> dict[str, Tensor]:
    """Translate a state dict. Raises ImportFailure naming keys that disagree, are unknown, missing or misshapen."""
    key_map, expected = KeyMap(model.config), model.state_dict()
    state: dict[str, Tensor] = {}
    seen: dict[tuple[str, int | None], str] = {}
    for name, value in theirs.items():
        parameter, index = target = key_map(name)
        if parameter not in expected:
            raise ImportFailure(f"{name}: the configuration describes no such parameter (looked for {parameter})")
        place = state.setdefault(parameter, torch.empty_like(expected[parameter], dtype=value.dtype))
        if (place if index is None else place[index]).shape != value.shape:
            raise ImportFailure(f"{name}: shape {tuple(value.shape)} does not fit {parameter} {tuple(place.shape)}")
        if target in seen and not torch.equal(place if index is None else place[index], value):
            raise ImportFailure(
                f"{name} and {seen[target]} should be one shared tensor and differ: in this checkpoint the sharing was "
                "lost (releases before September 2026 untie the attention of expert-choice); it cannot be imported"
            )
        (place if index is None else place[index]).copy_(value)
        seen[target] = name
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    missing = sorted(set(expected) - set(state))
    if missing:
        raise ImportFailure(f"the state dict lacks {len(missing)} parameters, the first is {missing[0]}")
    return state


def import_checkpoint(theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> MoRForCausalLM:
    """The authors' state dict and configuration as a model of this project."""
    model = MoRForCausalLM(reference_config(config))
    model.load_state_dict(reference_state(theirs, model))
    return model


def _read_config(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    # YAML 1.1 reads 1e-05 as a string, so JSON has its own reader.
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ImportFailure(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    return content


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one message about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m model.convert.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--state-dict", type=Path, required=True, help="their weights: .safetensors or a torch file")
    parser.add_argument("--config", type=Path, required=True, help="their configuration: JSON or YAML")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    try:
        model = import_checkpoint(_read_state(given.state_dict), _read_config(given.config))
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model.save_pretrained(given.output)
    print(f"{given.output}: {model.config.architecture}, {model.num_parameters():,} unique parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
