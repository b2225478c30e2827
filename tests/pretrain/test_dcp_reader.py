"""A sharded checkpoint is data: nothing in it runs, and what is no description of tensors is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException

from data_prep.settings import UserError
from pretrain.checkpoint import Marker, read_tensors
from pretrain.dcp_reader import SafeReader, read_metadata
from pretrain.parallel.deepspeed_files import BUFFERS, FACTS, NATIVE_TAG, read_deepspeed, safe_loading


class Payload:
    """Runs code of the one who wrote it when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of two tensors, as `sharded` is written."""
    folder = tmp_path / "step-00000001"
    tensors = {"model/a": torch.arange(6.0).view(2, 3), "optimizer/a/step": torch.tensor(3, dtype=torch.bfloat16)}
    dcp.save(tensors, checkpoint_id=folder / "tensors", no_dist=True)
    Marker(1, "sharded", "fsdp2", 1, {}).write(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    file = folder / "tensors" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def test_an_honest_checkpoint_is_read(checkpoint):
    tensors = read_tensors(checkpoint)
    assert torch.equal(tensors["model/a"], torch.arange(6.0).view(2, 3)) and tensors["optimizer/a/step"] == 3
    assert tensors["optimizer/a/step"].dtype is torch.bfloat16


@pytest.mark.parametrize("place", ["whole", "within"])
def test_a_payload_does_not_run(checkpoint, tmp_path, place):
    ran = tmp_path / "ran"

    def change(metadata):
        metadata.planner_data = Payload(ran)
        return Payload(ran) if place == "whole" else metadata

    rewrite(checkpoint, change)
    with pytest.raises(UserError, match=r"\.metadata: not read.*names"):
        read_tensors(checkpoint)
    with pytest.raises(CheckpointException):
        dcp.load({"model/a": torch.empty(2, 3)}, storage_reader=SafeReader(checkpoint / "tensors"), no_dist=True)
    assert not ran.exists()
    pickle.loads((checkpoint / "tensors" / ".metadata").read_bytes())
    assert ran.exists()  # the payload would have worked


@pytest.mark.slow
def test_a_payload_in_deepspeeds_files_does_not_run(tmp_path, monkeypatch):
    """Neither in its loader, nor in its converter, which is a process of its own."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    ran, native = tmp_path / "ran", tmp_path / "tensors" / NATIVE_TAG
    native.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": Payload(ran)}, native / name)
    save_file({"model/a": torch.zeros(1)}, native.parent / BUFFERS)
    (native.parent / FACTS).write_text('{"optimizer_steps": 1, "parameters": {}}')
    load = TorchCheckpointEngine().load
    with safe_loading(), pytest.raises(pickle.UnpicklingError):
        load(native / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"(?s)DeepSpeed's converter failed:.*Weights only load failed"):
        read_deepspeed(native.parent)
    assert not ran.exists()
    load(native / "mp_rank_00_model_states.pt")
    assert ran.exists()  # the payload would have worked


def test_objects_and_files_outside_are_refused(checkpoint):
    def to_object(metadata):
        metadata.state_dict_metadata["model/a"] = dcp.metadata.BytesStorageMetadata()

    def elsewhere(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = "../state.json"

    original = (checkpoint / "tensors" / ".metadata").read_bytes()
    for change, message in ((to_object, "BytesStorageMetadata"), (elsewhere, "outside its folder")):
        rewrite(checkpoint, change)
        with pytest.raises(ValueError, match=message):
            read_metadata(checkpoint / "tensors" / ".metadata")
        (checkpoint / "tensors" / ".metadata").write_bytes(original)
    (checkpoint / "tensors" / ".metadata").write_bytes(original[:50])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(checkpoint)
