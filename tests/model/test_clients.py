"""Other programs on what was exported, each in an environment of its own: the same greedy tokens. And the GGUF file by
itself: a Llama in fifty lines of numpy from its tensors, keys and vocabulary alone, as llama.cpp computes.

OLD_TRANSFORMERS_PYTHON names the Python of an environment with an older transformers (4.57), LLAMA_CPP_PYTHON one with
llama-cpp-python; without them these tests are skipped. RESULTS.md says with which versions they passed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.convert.export import main
from model.folder import write_folder
from model.inference import generate
from tests.helpers.tiny import tiny_model
from tests.model.test_export import byte_bpe

IDS, NEW = [5, 9, 77, 120, 33], 16
TEXT = "the state of the union"
TRANSFORMERS = f"""
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
made = model.generate(torch.tensor([{IDS}]), max_new_tokens={NEW}, do_sample=False, eos_token_id=None)
ids = tokenizer("{TEXT}")["input_ids"]
print(json.dumps([transformers.__version__, made[0, {len(IDS)}:].tolist(), ids, tokenizer.decode(ids)]))
"""
LLAMA_CPP = f"""
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
made = []
model.eval({IDS})
for _ in range({NEW}):
    made.append(model.sample(temp=0.0, repeat_penalty=1.0))
    model.eval(made[-1:])
ids = model.tokenize(b"{TEXT}", add_bos=False)
print(json.dumps([llama_cpp.__version__, made, ids, model.detokenize(ids).decode()]))
"""


def ask(variable: str, program: str, file: Path) -> list:
    """[version, tokens, ids of TEXT, their text], as the other program has them."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python")
    # Nothing of this environment is found from there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", program, str(file)]
    done = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "to"), [("vanilla", "llama"), ("recursive", "unrolled")])
@pytest.mark.parametrize("program", ["transformers", "llama.cpp"])
def test_another_program_completes_an_export_alike(tmp_path: Path, variant: str, to: str, program: str) -> None:
    variable = {"transformers": "OLD_TRANSFORMERS_PYTHON", "llama.cpp": "LLAMA_CPP_PYTHON"}[program]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no Python")
    byte_bpe(tmp_path / "tokenizer.json")
    model = tiny_model(variant, 1, vocab_size=290).float()
    write_folder(model, tmp_path / "in", tmp_path / "tokenizer.json")
    expected = model.generate(torch.tensor([IDS]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    kind = to if program == "transformers" else "gguf"
    assert main(["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--to", kind]) == 0
    if program == "transformers":
        found = ask(variable, TRANSFORMERS, tmp_path / "out")
    else:
        found = ask(variable, LLAMA_CPP, tmp_path / "out" / "model.gguf")
    assert found[1] == expected[0, len(IDS) :].tolist()
    assert found[3] == TEXT


# --- the GGUF file by itself ------------------------------------------------------------------------------------------


class GGUF:
    """A file's Llama and vocabulary, of which nothing is known but what the file says. T tokens, D hidden size."""

    def __init__(self, file: Path):
        from gguf import GGUFReader, quants

        reader = GGUFReader(file)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        assert self.keys["general.architecture"] == "llama"
        self.weights = {t.name: quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.tokens = self.keys["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {merge: i for i, merge in enumerate(self.keys["tokenizer.ggml.merges"])}

    def encode(self, text: str) -> list[int]:
        """Byte-level BPE: words split as the file's `pre` says, then the merge of lowest rank, again and again."""
        digits = {"gpt-2": r" ?\d+", "smollm": r"\d"}[self.keys["tokenizer.ggml.pre"]]
        split = rf"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+|{digits}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
        letters, found = bytes_to_unicode(), []
        for word in re.findall(split, text):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = enumerate(pairwise(parts))
                rank, i = min((self.ranks.get(f"{a} {b}", np.inf), i) for i, (a, b) in pairs)
                if rank == np.inf:
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found += [self.ids[part] for part in parts]
        return found

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.keys["llama.attention.layer_norm_rms_epsilon"])
        return x / scale * self.weights[f"{name}.weight"]

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """[T, heads, d]: neighbours in a head are turned together, as llama.cpp has it for this architecture."""
        turning = self.keys["llama.rope.dimension_count"]
        assert turning == x.shape[-1]
        speeds = self.keys["llama.rope.freq_base"] ** (-np.arange(0, turning, 2) / turning)
        turn = np.exp(1j * np.arange(len(x))[:, None] * speeds)[:, None]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def _attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        heads, groups = self.keys["llama.attention.head_count"], self.keys["llama.attention.head_count_kv"]
        q, k, v = (
            self._linear(x, f"{layer}.attn_{name}").reshape(len(x), count, -1)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = self._rotated(q), np.repeat(self._rotated(k), heads // groups, 1)
        v = np.repeat(v, heads // groups, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        return self._linear(mixed.reshape(len(x), -1), f"{layer}.attn_output")

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V]."""
        x = self.weights["token_embd.weight"][ids]
        for i in range(self.keys["llama.block_count"]):
            x = x + self._attention(self._norm(x, f"blk.{i}.attn_norm"), f"blk.{i}")
            normed = self._norm(x, f"blk.{i}.ffn_norm")
            gate, up = self._linear(normed, f"blk.{i}.ffn_gate"), self._linear(normed, f"blk.{i}.ffn_up")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, f"blk.{i}.ffn_down")
        head = "output" if "output.weight" in self.weights else "token_embd"
        return self._linear(self._norm(x, "output_norm"), head)

    def complete(self, text: str, tokens: int) -> list[int]:
        """Greedy tokens, until the one that ends a text."""
        ids, made = self.encode(text), list[int]()
        while len(made) < tokens:
            token = int(self.logits(ids + made)[-1].argmax())
            if token == self.keys["tokenizer.ggml.eos_token_id"]:
                break
            made.append(token)
        return made


@pytest.mark.parametrize(
    ("variant", "digits", "fields"),
    [
        ("vanilla", False, {}),
        ("vanilla", True, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("recursive", False, {}),
        ("recursive", True, {"relaxation": "lora", "lora_rank": 4}),
    ],
)
def test_a_gguf_file_completes_as_generate_does(tmp_path: Path, variant: str, digits: bool, fields: dict) -> None:
    pytest.importorskip("gguf")
    tokenizer = byte_bpe(tmp_path / "tokenizer.json", digits=digits)
    model = tiny_model(variant, 1, vocab_size=290, **fields).float()
    write_folder(model, tmp_path / "in", tmp_path / "tokenizer.json")
    assert main(["--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--to", "gguf"]) == 0
    file = GGUF(tmp_path / "out" / "model.gguf")
    assert file.keys["llama.attention.head_count"] > file.keys["llama.attention.head_count_kv"]
    text = "the state of the 1234 unions,  \u00e9t\u00e9\n it's 5_6"
    assert file.encode(text) == tokenizer.encode(text).ids
    prompts = [TEXT, text]
    written = tmp_path / "answers.jsonl"
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = ["--max-tokens", str(NEW), "--output", str(written)]
    generate.main(["--checkpoint", str(tmp_path / "in"), *asked, *options])
    answers = sorted((json.loads(line) for line in written.read_text().splitlines()), key=lambda row: row["line"])
    assert [file.complete(prompt, NEW) for prompt in prompts] == [answer["tokens"] for answer in answers]
    assert max(len(answer["tokens"]) for answer in answers) > 4
