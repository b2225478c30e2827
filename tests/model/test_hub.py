"""A folder with weights and code is complete: a process that cannot see this repository loads and runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model.convert.export import main
from model.modeling import MoRForCausalLM, MoRModel
from tests.helpers.tiny import VOCABULARY, tiny_model

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
VARIANTS = ["vanilla", "recursive-shared", "expert-aux-shared_update", "expert-lora", "token-recursion_wise"]
VARIANTS += ["expert-propagated", "mod-predictor", "ut", "exit-state", "exit-classifier"]

# Runs with neither the current folder nor the environment's paths; a finder ahead of all others hides this repository.
READER = """
    import sys
    from importlib.machinery import PathFinder

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("model", "pretrain", "data_prep", "launchers"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for folder in sys.argv[1:]:
        ids = load_file(f"{folder}/../ids.safetensors")["ids"]
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "mor"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            hidden = base(ids).last_hidden_state
            assert torch.equal(model.lm_head(hidden), model(ids).logits)
        new = model.generate(ids, max_new_tokens=5, do_sample=False)
        model.save_pretrained(folder + "/again")
        again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        save_file({"logits": model(ids).logits.detach(), "new": new}, folder + "/../answer-" + folder.split("/")[-1])
    assert not any(name.split(".")[0] == "model" for name in sys.modules)
"""


def export(folder: Path, variant: str) -> tuple[MoRForCausalLM, Path]:
    tiny_model(variant).save_pretrained(folder / f"{variant}-in")
    output = folder / variant
    assert main(["--checkpoint", str(folder / f"{variant}-in"), "--output", str(output), "--to", "hub"]) == 0
    return MoRForCausalLM.from_pretrained(folder / f"{variant}-in").eval(), output


@pytest.mark.slow
def test_folders_are_complete_without_this_repository(tmp_path: Path) -> None:
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    exported = [export(tmp_path, variant) for variant in VARIANTS]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", textwrap.dedent(READER), *(str(folder) for _, folder in exported)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for model, folder in exported:
        answer = load_file(tmp_path / f"answer-{folder.name}")
        assert torch.equal(answer["logits"], model(IDS).logits)
        assert torch.equal(answer["new"], model.generate(IDS, max_new_tokens=5, do_sample=False))


def test_with_this_repository_the_installed_code_runs(tmp_path: Path) -> None:
    model, folder = export(tmp_path, "expert-recursion_wise")
    described = json.loads((folder / "config.json").read_text())
    assert described["auto_map"]["AutoModelForCausalLM"] == "modeling.MoRForCausalLM"
    files = {path.name for path in folder.glob("*.py")}
    top = ["cache", "config", "decoder", "hardware", "layers", "modeling", "record", "relaxation", "sharing"]
    packages = {name: sorted((ROOT / "model" / name).glob("[!_]*.py")) for name in ("attention", "depth")}
    inner = {f"{package}_{path.name}": path for package, paths in packages.items() for path in paths}
    assert files == {f"{name}.py" for name in [*top, *packages]} | set(inner)
    for name in top:
        flat = (folder / f"{name}.py").read_text()
        for package in packages:
            flat = flat.replace(f"from .{package}_", f"from .{package}.")
        assert flat == (ROOT / "model" / f"{name}.py").read_text()
    for name, path in inner.items():
        flat = (folder / name).read_text()
        assert flat.replace(f"from .{path.parent.name}_", "from .") == path.read_text().replace("from ..", "from .")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=False).architecture == "mor_expert"
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=False)) is MoRModel
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    assert type(loaded) is MoRForCausalLM and torch.equal(loaded(IDS).logits, model(IDS).logits)
