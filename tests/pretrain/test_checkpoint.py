"""Checkpoints of one process: what is saved comes back exactly, what is not whole is never taken, and nothing is lost.

Several ranks, strategies and worlds are in test_parallel.py; kills, stalls and a rank's full disk in test_faults.py.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from data_prep.settings import UserError
from model.config import MoRConfig
from model.modeling import MoRForCausalLM
from pretrain import checkpoint
from pretrain.checkpoint import BrokenSave, Checkpoints, Outcome, committed, folder_of
from pretrain.parallel.settings import ParallelSettings
from pretrain.parallel.start import start_parallel
from pretrain.parallel.strategy import Parallel
from tests.helpers.experiments import ROUTED

pytestmark = pytest.mark.oldest

CONFIG = MoRConfig(**ROUTED["mor_token"], vocab_size=50, max_position_embeddings=16, balancing="loss_free")
TOKENS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(3))


def started(seed: int = 0, config: MoRConfig = CONFIG) -> Parallel:
    """A strategy of one process with a tiny model, one step after its beginning."""
    parallel = start_parallel(ParallelSettings(strategy="single"), "fp32", seed)
    parallel.prepare(MoRForCausalLM(config), lambda model: torch.optim.AdamW(model.parameters()))
    step(parallel)
    return parallel


def step(parallel: Parallel, before_update: Callable[[], object] = lambda: None) -> float:
    loss = parallel.forward(input_ids=TOKENS, labels=TOKENS).loss
    parallel.micro_step(loss, last=True)
    before_update()
    parallel.optimizer_step(1e-2, 1.0)
    parallel.module.update_router_bias(torch.rand(3))  # type: ignore[operator]  # moves a buffer, and the generator
    return float(loss.detach())


def store(folder: Path, **options: Any) -> tuple[Checkpoints, list[str]]:
    messages: list[str] = []
    return Checkpoints(folder, asynchronous=False, report=messages.append, **options), messages


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint, and the losses of the steps that followed it."""
    parallel, folder = started(), tmp_path_factory.mktemp("saved")
    store(folder)[0].save(parallel, {"position": 7}, 1)
    return folder_of(folder, 1), [step(parallel) for _ in range(3)]


@pytest.mark.parametrize("form", ["as saved", "consolidated", "sharded"])
def test_training_goes_on_bit_for_bit(saved: tuple[Path, list[float]], form: str, tmp_path: Path):
    source, expected = saved
    if form != "as saved":
        checkpoint.main(["convert", str(source), str(tmp_path / "step-00000001"), "--to", form])
        source = tmp_path / "step-00000001"
    other = started(seed=5)
    state = store(tmp_path)[0].load(other, source)
    assert state == {"position": 7}
    assert [step(other) for _ in range(3)] == expected


def test_a_copy_in_the_background_is_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However slow the copy is: an update waits for it, as the trainer's does."""
    parallel = started()
    background = Checkpoints(tmp_path, asynchronous=True, report=print)
    copy = background.staging.copy

    def slowly(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        time.sleep(0.3)
        return copy(tensors, device)

    monkeypatch.setattr(background.staging, "copy", slowly)
    background.save(parallel, {}, 1)
    following = step(parallel, background.wait_for_copy)
    background.wait()
    other = started(seed=5)
    background.load(other, folder_of(tmp_path, 1))
    assert step(other) == following


def test_generators_come_back():
    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(2).tolist()]  # noqa: NPY002 (the global one is meant)

    state = checkpoint.random_state()
    drawn = draw()
    assert draw() != drawn
    checkpoint.set_random_state(state)
    assert draw() == drawn


def test_tied_weights_are_stored_once(saved: tuple[Path, list[float]], tmp_path: Path):
    checkpoint.convert(saved[0], tmp_path / "c", "consolidated")
    with safe_open(tmp_path / "c" / "tensors" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    model = MoRForCausalLM(CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert names == {f"model/{n}" for n in [*dict(model.named_parameters()), "model.depth.router_bias"]}


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path):
    parallel, (checkpoints, messages) = started(), store(tmp_path, keep=2, milestone_every=4)
    for number in range(1, 8):
        checkpoints.save(parallel, {}, number)
    assert [number for number, _ in committed(tmp_path)] == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (4, 6, 7)]
    assert messages == []


def test_the_step_of_a_damaged_checkpoint_is_saved_again(tmp_path: Path):
    parallel, (checkpoints, _) = started(), store(tmp_path)
    for number in (1, 2, 2):
        checkpoints.save(parallel, {"try": number}, number)
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def shorten(folder: Path) -> None:
    path = next((folder / "tensors").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = next((folder / "tensors").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no marker": (lambda folder: (folder / "COMMITTED.json").unlink(), ""),
    "empty marker": (lambda folder: (folder / "COMMITTED.json").write_text("{}"), "COMMITTED.json is damaged"),
    "half a marker": (lambda folder: (folder / "COMMITTED.json").write_text('{"step"'), "passed over"),
    "short shard": (shorten, "bytes, not"),
    "flipped bit": (flip, "sha256"),
    "lost state": (lambda folder: (folder / "state.json").unlink(), "state.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_passed_over(kind: str, tmp_path: Path):
    damage, message = DAMAGE[kind]
    parallel, (checkpoints, messages) = started(), store(tmp_path)
    checkpoints.save(parallel, {}, 1)
    checkpoints.save(parallel, {}, 2)
    damage(folder_of(tmp_path, 2))
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 1)
    assert (message in "\n".join(messages)) and bool(messages) == bool(message)


def test_nothing_whole_is_nothing(tmp_path: Path):
    (tmp_path / "step-00000003.partial").mkdir()
    checkpoints, messages = store(tmp_path)
    assert checkpoints.latest(started()) is None
    assert "interrupted" in messages[0] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["tensors", "marker", "state"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(
    place: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parallel = started()
    messages: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous, report=messages.append)
    checkpoints.save(parallel, {}, 1)
    checkpoints.wait()

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "tensors":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        elif place == "marker":
            patch.setattr(checkpoint.Marker, "write", full)
        else:
            patch.setattr(checkpoint, "_begin", full)
        checkpoints.save(parallel, {}, 2)
        checkpoints.wait()
    assert checkpoints.failures == 1 and "No space left" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 1)
    checkpoints.save(parallel, {}, 3)
    checkpoints.wait()
    assert [number for number, _ in committed(tmp_path)] == [3]


@pytest.mark.parametrize("place", ["copy", "write", "digest", "publish"])
@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug")], ids=["KeyError", "RuntimeError"])
def test_whatever_ends_a_save_in_the_background_is_known(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parallel = started()
    messages: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=True, report=messages.append)
    checkpoints.save(parallel, {}, 1)
    assert checkpoints.wait() == Outcome(1)
    owner = {"copy": "Checkpoints._copy", "write": "dcp.save", "digest": "_digest", "publish": "Checkpoints._publish"}

    def broken(*arguments: Any, **keywords: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"pretrain.checkpoint.{owner[place]}", broken)
        assert checkpoints.save(parallel, {}, 2) is None
        checkpoints.wait_for_copy()
        outcome = checkpoints.wait()
    assert outcome is not None and outcome.step == 2 and "a bug" in (outcome.error or "")
    assert checkpoints.failures == 1 and len(messages) == 1 and "step-00000002 was not written" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(parallel, {}, 3)
    assert checkpoints.wait() == Outcome(3)


def test_a_thread_that_ends_without_agreement_is_raised_where_the_main_thread_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The ranks lost each other in the midst of a save: nobody can say what became of it."""
    parallel, checkpoints = started(), Checkpoints(tmp_path, asynchronous=True)
    gather, calls = parallel.gather, []

    def lose(value: Any, background: bool = False) -> list[Any]:
        calls.append(background)
        if len(calls) == 4:
            raise ConnectionError("connection closed by peer")
        return gather(value, background)

    monkeypatch.setattr(parallel, "gather", lose)
    checkpoints.save(parallel, {}, 1)
    with pytest.raises(BrokenSave, match=r"step-00000001.*connection closed by peer"):
        checkpoints.wait()
    assert committed(tmp_path) == []


def test_buffers_are_made_once_and_each_save_holds_its_own_moment(tmp_path: Path):
    parallel, checkpoints = started(), Checkpoints(tmp_path, keep=9, asynchronous=True)
    addresses, expected = [], []
    for number in range(1, 4):
        checkpoints.save(parallel, {}, number)
        expected.append({name: tensor.clone() for name, tensor in checkpoint.named_tensors(parallel).items()})
        checkpoints.wait_for_copy()
        step(parallel)
        assert checkpoints.wait() == Outcome(number)
        addresses.append({name: buffer.data_ptr() for name, buffer in checkpoints.staging.buffers.items()})
    assert addresses[0] == addresses[1] == addresses[2] and len(set(addresses[0].values())) == len(addresses[0])
    for number, tensors in enumerate(expected, 1):
        found = checkpoint.read_tensors(folder_of(tmp_path, number))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_damaged_checkpoints_are_set_aside_and_never_counted(tmp_path: Path):
    """Retention once kept a damaged checkpoint of a later step, and removed every good one for its sake."""
    parallel, (checkpoints, messages) = started(), store(tmp_path, keep=1)
    checkpoints.save(parallel, {}, 8)
    Checkpoints(tmp_path, keep=9, asynchronous=False).save(parallel, {}, 10)
    for _ in range(2):
        shorten(folder_of(tmp_path, 10))
        assert checkpoints.latest(parallel) == folder_of(tmp_path, 8)
        Checkpoints(tmp_path, keep=9, asynchronous=False).save(parallel, {}, 10)
        assert "set aside as step-00000010.damaged" in messages[-1]
    shorten(folder_of(tmp_path, 10))
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 8)
    checkpoints.save(parallel, {}, 9)
    assert committed(tmp_path) == [(9, folder_of(tmp_path, 9))]
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000009", "step-00000010.damaged", "step-00000010.damaged-2", "step-00000010.damaged-3",
    ]  # fmt: skip


def test_what_was_just_written_is_never_pruned(tmp_path: Path):
    parallel = started()
    store(tmp_path, keep=9)[0].save(parallel, {}, 10)
    checkpoints, _ = store(tmp_path, keep=1)
    checkpoints.save(parallel, {}, 9)
    assert [number for number, _ in committed(tmp_path)] == [9, 10]


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path):
    """A kill between the two renames of a save of the same step."""
    parallel, (checkpoints, _) = started(), store(tmp_path, keep=1)
    checkpoints.save(parallel, {}, 1)
    folder_of(tmp_path, 1).rename(tmp_path / "step-00000001.replaced")
    (tmp_path / "step-00000001.partial").mkdir()
    assert checkpoints.latest(parallel) == folder_of(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, list[float]], tmp_path: Path):
    wider = MoRConfig(**{**ROUTED["mor_token"], "intermediate_size": 40}, vocab_size=50, balancing="loss_free")
    with pytest.raises(UserError, match=r"mlp.* is torch.Size.*and torch.Size"):
        store(tmp_path)[0].load(started(config=wider), saved[0])


def test_export_makes_a_folder_for_from_pretrained(saved: tuple[Path, list[float]], tmp_path: Path):
    checkpoint.main(["export", str(saved[0]), str(tmp_path / "model")])
    loaded = MoRForCausalLM.from_pretrained(tmp_path / "model").eval()
    parallel = started(seed=5)
    store(tmp_path)[0].load(parallel, saved[0])
    expected = parallel.module.eval()(input_ids=TOKENS).logits
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected)


def test_the_command_line_refuses_what_it_cannot_use(saved: tuple[Path, list[float]], tmp_path: Path):
    with pytest.raises(UserError, match=r"COMMITTED.json"):
        checkpoint.main(["verify", str(tmp_path)])
    with pytest.raises(UserError, match="exists already"):
        checkpoint.main(["convert", str(saved[0]), str(tmp_path)])


def test_a_store_that_keeps_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)
