"""Other programs on what was exported, each in an environment of its own: the same greedy tokens.

OLD_TRANSFORMERS_PYTHON names the Python of an environment with an older transformers (4.57), LLAMA_CPP_PYTHON one with
llama-cpp-python; without them these tests are skipped. RESULTS.md says with which versions they passed.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from model.convert.export import main
from model.folder import write_folder
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
