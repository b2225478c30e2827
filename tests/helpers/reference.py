"""Reading the numeric reference cases: tensors and hyper-parameters of the authors' implementation."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from model.convert.reference import KeyMap, main
from model.modeling import MoRForCausalLM

KEPT = Path(__file__).parent.parent / "model" / "reference_cases"
ALL = Path(os.environ.get("MOR_REFERENCE_CASES", Path(__file__).parents[3] / "shared" / "reference_cases"))


def case_folders() -> list[Path]:
    """Every case: those kept in the repository, and those under MOR_REFERENCE_CASES."""
    return [path.parent for root in (KEPT, ALL) for path in sorted(root.glob("*/case.json"))]


@dataclass
class Case:
    """One reference case."""

    folder: Path
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Case:
        info = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return cls(folder, info, load_file(folder / "tensors.safetensors"))

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self, folder: Path) -> MoRForCausalLM:
        """The case's model, by way of the import command and `from_pretrained`."""
        state = folder / "state.safetensors"
        save_file(self.prefixed("param."), state)
        output = folder / "imported"
        assert (
            main(["--state-dict", str(state), "--config", str(self.folder / "case.json"), "--output", str(output)]) == 0
        )
        return MoRForCausalLM.from_pretrained(output)

    def expected(self, mode: str, name: str) -> Tensor | None:
        """The reference's tensor in `train` or `eval`: mended where a mended one exists; eval falls back to train."""
        modes = [mode] if mode.startswith("train") else ["eval", "train"]
        for key in [f"fixed.{m}.{name}" for m in modes] + [f"{m}.{name}" for m in modes]:
            if key in self.tensors:
                return self.tensors[key]
        return None

    def figures(self, mode: str) -> dict[str, Any]:
        """Losses and counts of `train` or `eval`, mended where that exists."""
        return self.info.get("fixed", self.info)[mode]

    def gradients(self) -> dict[str, Tensor]:
        """Expected gradients by the authors' names, mended where that exists."""
        return self.prefixed("fixed.grad.") or self.prefixed("grad.")


def compare_parameters(model: MoRForCausalLM, expected: dict[str, Tensor], gradient: bool, compare) -> int:
    """Call compare(ours, theirs, name) for each of the authors' tensors; returns how many there were."""
    names, key_map = (
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers()),
        KeyMap(model.config),
    )
    for name, theirs in expected.items():
        parameter, index = key_map(name)
        ours = names[parameter].grad if gradient else names[parameter].detach()
        assert ours is not None, f"{name}: no gradient"
        compare(ours if index is None else ours[index], theirs, name)
    return len(expected)
