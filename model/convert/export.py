"""Turn a checkpoint into a folder for others.

    python -m model.convert.export --checkpoint DIR --output DIR --to llama|unrolled|gguf|hub

llama: a vanilla model under the names of transformers' Llama; the same weights, bit for bit.
unrolled: a recursive model as a plain Llama of its effective depth: each use of a shared layer becomes a layer of its
    own, per-depth norms go to their depth, LoRA and DoRA deltas are merged into the weights. What Llama has no place
    for (routing, keys and values shared among recursions, recursion encodings) is refused.
gguf: what `unrolled` makes, as one file `model.gguf` for llama.cpp, with the vocabulary of a byte-level BPE.
hub: any model with the code that runs it, so that `from_pretrained(folder, trust_remote_code=True)` needs transformers
    and torch, and not this repository.

A tokenizer beside the weights (`tokenizer.json`) and the facts of the model card (`README.md`) go along.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..config import MoRConfig
from ..depth import METHODS
from ..folder import CARD, model_card, set_modes, write_folder
from ..modeling import MoRForCausalLM
from ..relaxation import RelaxedLinear
from ..sharing import Application, applications
from .gguf import write_gguf

_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_AUTO_MAP = {
    "AutoConfig": "config.MoRConfig",
    "AutoModel": "modeling.MoRModel",
    "AutoModelForCausalLM": "modeling.MoRForCausalLM",
}


def to_llama(model: MoRForCausalLM) -> LlamaForCausalLM:
    """A vanilla model as transformers' Llama. Raises ValueError for another architecture."""
    if model.config.architecture != "vanilla":
        raise ValueError(
            f"num_recursions: a {model.config.architecture} model is no Llama as it stands; a recursive one can be "
            "exported with --to unrolled, every one with --to hub"
        )
    return unroll(model)


def unroll(model: MoRForCausalLM) -> LlamaForCausalLM:
    """A vanilla or recursive model as a plain Llama of its effective depth.

    Raises ValueError naming the field that Llama cannot express.
    """
    config = model.config
    for field, allowed in (("routing", ("none",)), ("kv_strategy", ("recursion_wise",))):
        if getattr(config, field) not in allowed:
            raise ValueError(f"{field}: Llama cannot express {getattr(config, field)!r}; export with --to hub")
    if config.relaxation == "recursion_encoding":
        raise ValueError(
            "relaxation: Llama cannot express 'recursion_encoding', which scales the residual stream; export with "
            "--to hub"
        )
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("model.layers.")}
    for use in applications(config):
        state |= {f"model.layers.{use.depth}.{name}": value for name, value in _layer_state(model, use).items()}
    llama: Any = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in _LLAMA_FIELDS}))
    llama = llama.to(model.dtype)
    llama.load_state_dict(state)
    return llama.train(model.training)


def _layer_state(model: MoRForCausalLM, use: Application) -> dict[str, Tensor]:
    """Parameters of one use of a layer, by Llama's names within the layer."""
    recursion = use.recursion or 0
    state = {}
    for name, module in model.model.layers[use.layer].named_modules():
        if isinstance(module, RelaxedLinear):
            state[f"{name}.weight"] = module.effective_weight(recursion)
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias
        elif not name.split(".")[-1].isdigit():
            state |= {f"{name}.{key}": value for key, value in module.named_parameters(recurse=False)}
        elif int(name.split(".")[-1]) == recursion:
            state[f"{name.rsplit('.', 1)[0]}.weight"] = module.weight
    return state


def save_for_hub(model: MoRForCausalLM, output: Path, tokenizer: Path | None = None, card: str = "") -> None:
    """Write weights, configuration and the files of this package that the model needs, flat, into `output`."""
    model.config.auto_map = dict(_AUTO_MAP)
    try:
        write_folder(model, output, tokenizer, card)
    finally:
        del model.config.auto_map
    for name, source in flat_sources().items():
        (output / name).write_text(source, encoding="utf-8")


def flat_sources() -> dict[str, str]:
    """The code that the model needs as transformers reads it, in one folder without packages: file name -> text.

    A module of a package, `depth/base.py`, becomes `depth_base.py`, the package itself `depth.py`.
    """
    package = MoRConfig.__module__.rpartition(".")[0]
    found: dict[str, str] = {}
    wanted = ["modeling"]
    while wanted:
        module = wanted.pop()
        name = module.replace(".", "_") + ".py"
        if name in found:
            continue
        spec = importlib.util.find_spec(f"{package}.{module}")
        assert spec is not None and spec.origin is not None
        # The package whose names one dot reaches.
        inside = module if spec.submodule_search_locations else module.rpartition(".")[0]
        # Where there is no folder to look for methods in, the files are named.
        source = Path(spec.origin).read_text("utf-8").replace("\nfind_methods()\n", f"\n{_imports_of_methods()}\n")

        def flat(match: re.Match[str], inside: str = inside) -> str:
            if match[3] is None:  # names of the package itself, which other modules import by their own names too
                return f"{match[1]}from . import"
            above = inside.split(".")[: len(inside.split(".")) + 1 - len(match[2])] if inside else []
            target = ".".join([*above, *match[3].split(".")])
            wanted.append(target)
            return f"{match[1]}from .{target.replace('.', '_')} import"

        found[name] = re.sub(r"^( *)from (\.+)(\w[\w.]*)? import", flat, source, flags=re.MULTILINE)
    return found


def _imports_of_methods() -> str:
    return "\n".join(f"from .{of.__module__.rpartition('.')[2]} import {of.__name__}" for of in METHODS.values())


def export(checkpoint: Path, output: Path, to: str) -> MoRForCausalLM | LlamaForCausalLM:
    """Read `checkpoint`, write `output`. Raises ValueError that names what is wrong with either."""
    kind = _model_type(checkpoint)
    if kind != MoRConfig.model_type:
        raise ValueError(f"checkpoint: {checkpoint} holds a model of type {kind!r}, not one of this project")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty; name a new folder")
    model = MoRForCausalLM.from_pretrained(checkpoint)
    file = checkpoint / "tokenizer.json"
    tokenizer = file if file.is_file() else None
    before = (checkpoint / CARD).read_text(encoding="utf-8") if (checkpoint / CARD).is_file() else ""
    if to == "hub":
        save_for_hub(model, output, tokenizer, model_card(model, before=before))
        return model
    model = to_llama(model) if to == "llama" else unroll(model)
    card = model_card(model, before=before)
    if to == "gguf":
        _write_gguf(model, output, tokenizer, card)
    else:
        write_folder(model, output, tokenizer, card)
    return model


def _write_gguf(model: LlamaForCausalLM, output: Path, tokenizer: Path | None, card: str) -> None:
    """`model.gguf`, under this name when it is whole, and its card."""
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "model.gguf.partial"
    try:
        write_gguf(model, partial, tokenizer)
    except BaseException:
        partial.unlink(missing_ok=True)
        if made:
            output.rmdir()
        raise
    partial.rename(output / "model.gguf")
    (output / CARD).write_text(card, encoding="utf-8")
    set_modes(output)


def _model_type(checkpoint: Path) -> str:
    file = checkpoint / "config.json"
    if not file.exists():
        raise ValueError(f"checkpoint: {checkpoint} holds no config.json; name a folder that save_pretrained wrote")
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {file} is no model configuration: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one message about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m model.convert.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that save_pretrained wrote")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument(
        "--to", choices=("llama", "unrolled", "gguf", "hub"), required=True, help="what the folder will hold"
    )
    given = parser.parse_args(arguments)
    try:
        with torch.no_grad():
            model = export(given.checkpoint, given.output, given.to)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: {model.config.model_type}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
