"""DeepSpeed's checkpoints, which are unpickled safely or not at all.

The process that converts one imports this file, torch and DeepSpeed, and none of the trainer: half the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.settings import UserError

NATIVE_TAG, FACTS, BUFFERS = "native", "facts.json", "buffers.safetensors"  # in a checkpoint


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it torch.load builds tensors and the three plain classes that DeepSpeed writes, and nothing else.

    DeepSpeed's loader and converter unpickle, which could run code of who wrote the file. What may not be built raises
    UnpicklingError.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # outdoes weights_only=False, which DeepSpeed asks for
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[switch]
        os.environ |= {} if before is None else {switch: before}


def convert_deepspeed() -> None:
    """The process that `read_deepspeed` starts: DeepSpeed's converter, on its own command line, reading safely."""
    from deepspeed.checkpoint import ds_to_universal

    with safe_loading():
        ds_to_universal.main(ds_to_universal.parse_arguments())


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """All tensors of a DeepSpeed checkpoint, whole, in fp32, under the names of `pretrain.checkpoint`.

    DeepSpeed's own converter to its universal format does the work, in a process of its own. Raises UserError where it
    fails, as it does for a file that holds more than tensors.
    """
    tensors = load_file(folder / BUFFERS)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tool = [sys.executable, "-m", "pretrain.parallel.deepspeed_files", "--inject_missing_state"]
        root = Path(__file__).resolve().parents[2]  # where -m finds this module
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        universal = Path(scratch, "universal").resolve()
        folders = ["--input_folder", str(folder.resolve() / NATIVE_TAG), "--output_folder", str(universal)]
        done = subprocess.run([*tool, *workers, *folders], capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise UserError(f"{folder}: DeepSpeed's converter failed:\n{done.stderr[-2000:]}")
        for name, shape in facts["parameters"].items():
            for path in (universal / "zero" / name).glob("*.pt"):
                content = torch.load(path, weights_only=True)
                value = content["param"] if isinstance(content, dict) else content
                if path.stem == "fp32":
                    tensors[f"model/{name}"] = value.float().reshape(shape)
                elif path.stem != "step":
                    tensors[f"optimizer/{name}/{path.stem}"] = value.float().reshape(shape)
            tensors[f"optimizer/{name}/step"] = torch.tensor(float(facts["optimizer_steps"]))
    return tensors


if __name__ == "__main__":
    convert_deepspeed()
