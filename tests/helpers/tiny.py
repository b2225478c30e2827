"""Tiny models of every architecture and KV strategy, with routers whose decisions vary from token to token."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from model.config import MoRConfig
from model.modeling import MoRForCausalLM
from tests.helpers.variants import VARIANTS

VOCABULARY = 41


def tiny_config(variant: str, **fields) -> MoRConfig:
    """hidden 32, 4 heads over 2 key/value heads, vocabulary `VOCABULARY`; at most 8 effective layers."""
    chosen = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_hidden_layers": 2 + 2 * VARIANTS[variant].get("num_recursions", 1),
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    return MoRConfig(**(chosen | VARIANTS[variant] | fields))


def tiny_model(variant: str, seed: int = 0, **fields) -> MoRForCausalLM:
    """An untrained model in fp64, where the order of additions changes nothing that counts; depths vary over tokens."""
    torch.manual_seed(seed)
    model = MoRForCausalLM(tiny_config(variant, **fields)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "predictor" in name or "halt" in name:
                parameter.mul_(8.0)
            elif "lora_B" in name or "recursion_encoding" in name or ("norm" in name and parameter.dim() == 1):
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "classifier" in name:
                torch.nn.init.normal_(buffer)
    return model


def tiny_tokenizer() -> Tokenizer:
    """One token a character: 0 ends a text, then a to z, space, digits and three marks."""
    characters = "abcdefghijklmnopqrstuvwxyz 0123456789.,?"
    vocabulary = {"<eos>": 0} | {character: i for i, character in enumerate(characters, 1)}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def save_tiny(folder: Path, variant: str, seed: int = 1) -> Path:
    """A checkpoint folder as a finished run leaves it."""
    tiny_model(variant, seed).float().save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
