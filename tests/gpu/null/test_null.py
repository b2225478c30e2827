"""Training and decoding on a CUDA device that computes nothing: what the host does there, without a GPU.

Opt-in, as torch's CUDA build takes gigabytes: `make null-gpu VENV=...`, or NULL_DEVICE=FOLDER of a built null device
in an environment whose torch is a CUDA build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.null import build
from tests.gpu.null.device import FOLDER, environment

pytestmark = pytest.mark.timeout(1800)  # minutes of compiling, on a busy machine many
ROOT = Path(__file__).resolve().parents[3]
WHY_NOT = build.refusal() or (None if FOLDER in os.environ else f"{FOLDER} names no folder; see `make null-gpu`")


def lines_of(*arguments: str, script: str = "steps") -> list[dict]:
    command = [sys.executable, "-m", f"tests.gpu.null.{script}", *arguments]
    folder = Path(os.environ[FOLDER]).resolve()
    ended = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=f"the null device: {WHY_NOT}")
def test_no_variant_makes_the_host_wait_in_a_micro_batch():
    lines = lines_of()
    assert len(lines) > 50
    for line in lines:
        assert not line["operations_that_wait"] and not line["to_device_unpinned"], line


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=f"the null device: {WHY_NOT}")
@pytest.mark.parametrize("policy", ["block", "recursion", "selective"])
def test_recomputation_runs_there_too(policy: str):
    lines_of("--policy", policy, "vanilla", "expert-shared_update", "token-shared", "mod", "ut")


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=f"the null device: {WHY_NOT}")
@pytest.mark.parametrize("model", ["360m_vanilla", "360m_mor_expert_nr3"])
def test_compiled_layers_take_the_memory_that_is_estimated(model: str):
    for line in lines_of("--model", "--compiled", model):
        assert not line["graph_breaks"] and abs(line["peak_gib"] / line["estimate_gib"] - 1) < 0.05, line


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=f"the null device: {WHY_NOT}")
def test_a_decoding_step_is_few_launches_one_graph_and_one_read():
    lines = lines_of(script="decode")
    assert len(lines) == 2
    for line in lines:
        assert line["launches"] <= 350 and line["graphs"] == 1, line
        assert line["waits"] == line["to_host"] == line["to_device"] == 1 and not line["to_device_unpinned"], line


def test_what_keeps_it_from_being_built_is_said(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda tool: None)
    assert build.refusal() in ("this Python's torch is no CUDA build", "gcc is not installed")


def test_stubs_are_made_for_what_a_library_asks_of_others(tmp_path: Path, monkeypatch):
    """What runtime.c defines is not made again; products are counted, and everything else succeeds."""
    asked = {"torch_cuda": {"cudaMalloc", "cudaGraphDestroy", "cublasGemmEx", "cublasLtCreate"}}
    monkeypatch.setattr(build, "wanted", lambda library: asked.get(library.stem.removeprefix("lib"), set()))
    build.write_stubs(Path("unused"), tmp_path)
    rest, driver = (tmp_path / "rest.c").read_text(), (tmp_path / "driver.c").read_text()
    assert "cudaMalloc(" not in rest and "int cudaGraphDestroy(void) { return 0; }" in rest
    assert "int cublasGemmEx(void) { COUNTED(0); COUNTED(1); return 0; }" in rest
    assert "int cuLaunchKernel(void) { COUNTED(0); return 0; }" in driver and "int cuInit(void) { return 0; }" in driver
