"""Checkpoints: staged, verified, committed by a marker; sharded as the strategy writes them, or consolidated.

A checkpoint is a folder `step-00000050/`:

    tensors/          model and optimizer: torch.distributed.checkpoint (format `sharded`), DeepSpeed's own
                      (`deepspeed`), or `model.safetensors` and `optimizer.safetensors` (`consolidated`)
    random-00000.pt   random number generators of each rank
    state.json        what the trainer gave: schedule, data position, FLOPs, tracker id, configuration, versions
    COMMITTED.json    format, step, ranks, and size and sha256 of every other file

It is written as `step-00000050.partial/`, the marker last, and renamed when whole. A folder without its marker is
passed over for the one before; one whose files do not match its marker is set aside as `step-00000050.damaged` and
never counted. Removal takes the marker first. All ranks must see the same folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from data_prep.settings import UserError, run_command
from model.depth import current_name
from pretrain.dcp_reader import SafeReader, read_metadata
from pretrain.facts import run_facts
from pretrain.parallel.deepspeed_files import read_deepspeed
from pretrain.parallel.strategy import Parallel
from pretrain.stop import disk_error

MARKER = "COMMITTED.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")  # one process
Format = Literal["sharded", "deepspeed", "consolidated"]
T = TypeVar("T")


class SaveError(Exception):
    """A checkpoint could not be written; what was there before is untouched. Raised on every rank alike."""


class BrokenSave(Exception):
    """The ranks could not agree on what became of a save: the run cannot go on. What was there before is untouched."""


@dataclass(frozen=True)
class Outcome:
    """What became of a save, the same on every rank. error: why it was not written, in words; None where it was."""

    step: int
    error: str | None = None

    @property
    def written(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class Marker:
    """What COMMITTED.json says. files: path below the folder -> (bytes, sha256)."""

    step: int
    format: Format
    strategy: str
    world_size: int
    files: dict[str, tuple[int, str]]

    @staticmethod
    def read(folder: Path) -> Marker:
        """Read a folder's marker. Raises OSError or ValueError where there is none or it is damaged."""
        try:
            content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
            return Marker(content["step"], content["format"], content["strategy"], content["world_size"], files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{MARKER} is damaged: {error!r}") from None

    def write(self, folder: Path) -> None:
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        content = {**vars(self), "files": files}
        with (folder / MARKER).open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def folder_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def committed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that carries its marker, oldest first."""
    found = []
    for folder in root.glob("step-*"):
        match = re.fullmatch(r"step-(\d{8,})", folder.name)
        if match and (folder / MARKER).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Hold this rank's share of a checkpoint's files against its marker; the first fault in words, or None."""
    try:
        marker = Marker.read(folder)
        for name, (size, digest) in sorted(marker.files.items())[rank::world_size]:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
            if _sha256(folder / name) != digest:
                return f"{name} does not match its sha256"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Staging:
    """Host memory for copies of tensors, allocated once (pinned for a GPU) and filled anew by every save of a run."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Copies of `tensors`, of which a DTensor's is of this rank's shard; valid until the next call.

        On a GPU they travel in a stream of their own, beside the passes, and have arrived when this returns.
        """
        on_gpu = device.type == "cuda"
        if on_gpu and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.no_grad(), torch.cuda.stream(self._stream) if on_gpu else nullcontext():
            copies = {name: self._copy(name, tensor, on_gpu) for name, tensor in tensors.items()}
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor, pin: bool) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = self.buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
            self.buffers[name] = buffer
        buffer.copy_(local, non_blocking=pin)
        # DTensor.from_local would carry the buffer back to the device of the mesh.
        return DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer


class Checkpoints:
    """The checkpoints of one run, in one folder.

    keep: newest checkpoints kept. milestone_every: steps whose multiples are kept for ever; 0 keeps none.
    asynchronous: copy and write in the background where the strategy allows (all but DeepSpeed). At most one save runs
        at a time, and nothing may change the tensors until `wait_for_copy` returns: the next forward and backward pass
        run beside the copy, the update waits for it.
    report: receives one line for each event worth knowing (a save that failed, a checkpoint passed over).
    written: called on rank 0, maybe in the background, with the step of each checkpoint once it is whole.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        milestone_every: int = 0,
        asynchronous: bool = True,
        report: Callable[[str], None] = print,
        written: Callable[[int], None] = lambda step: None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1 (given: {keep})")
        self.folder = Path(folder)
        self.keep, self.milestone_every, self.asynchronous = keep, milestone_every, asynchronous
        self.report, self.written = report, written
        self.held: set[int] = set()  # steps that are kept for good beside the milestones
        self.failures = 0
        self.staging = Staging()
        self._outcome: Outcome | None = None
        self._told = True  # whether a failure in `_outcome` has been reported
        self._broken: BaseException | None = None  # what ended the thread where the ranks could not agree
        self._thread: threading.Thread | None = None
        self._parallel: Parallel | None = None
        self._copied = threading.Event()
        self._copied.set()

    # saving ---------------------------------------------------------------------------------------------------------

    def save(self, parallel: Parallel, state: dict[str, Any], step: int) -> Outcome | None:
        """Write a checkpoint of `step`; collective. `state`: anything JSON holds, the same on every rank.

        Returns what became of it, or None while it is under way in the background: `wait` tells then. A save that
        fails, for whatever reason, is reported and counted in `failures`; earlier checkpoints are untouched.
        """
        self.wait()
        self._parallel = parallel
        partial = folder_of(self.folder, step).with_suffix(".partial")
        try:
            with parallel.busy(f"beginning checkpoint {partial.stem}"):
                _together(parallel, lambda: _begin(parallel, partial, state))
                _together(parallel, lambda: torch.save(random_state(), partial / f"random-{parallel.rank:05d}.pt"))
                tensors = self._write_tensors(parallel, partial / "tensors")
        except SaveError as error:
            self._give_up(parallel, partial, step, error)
            return self.wait()
        if tensors is None:
            with parallel.busy(f"writing checkpoint {partial.stem}"):
                self._commit(parallel, partial, step, None)
            return self.wait()
        self._thread = threading.Thread(
            target=self._in_background, args=(parallel, partial, step, tensors), name="checkpoint"
        )
        self._thread.start()
        return None

    def wait(self) -> Outcome | None:
        """Wait for the save that is under way, if any, and report it if it failed.

        Returns what became of the last save, None if there was none. Raises BrokenSave where the ranks lost each other.
        """
        if self._thread is not None and self._parallel is not None:
            with self._parallel.busy("waiting for a checkpoint to be written"):
                self._thread.join()
            self._thread = None
        if self._broken is not None:
            error, self._broken = self._broken, None
            raise BrokenSave(self._tell()) from error
        if self._outcome is not None and not self._told:
            self._told = True
            self.report(self._tell())
        return self._outcome

    def _tell(self) -> str:
        assert self._outcome is not None
        name = folder_of(self.folder, self._outcome.step).name
        return f"checkpoint {name} was not written, the ones before are intact: {self._outcome.error}"

    def wait_for_copy(self) -> Outcome | None:
        """Wait until the tensors of the save that is under way, if any, are copied and may change again.

        Returns None while that save is being written, else as `wait` does, so that a failure is told at the next step.
        """
        if self._parallel is not None and not self._copied.is_set():
            with self._parallel.busy("copying a checkpoint"):
                self._copied.wait()
        return None if self._thread is not None and self._thread.is_alive() else self.wait()

    def _write_tensors(self, parallel: Parallel, folder: Path) -> dict[str, Tensor] | None:
        """Write the tensors; or return those that the background shall copy and write, which then owns the group."""
        if parallel.checkpoint_format == "deepspeed":
            _together(parallel, lambda: parallel.save_native(folder))
            return None
        tensors = _together(parallel, lambda: named_tensors(parallel))
        if not self.asynchronous:
            _together(parallel, lambda: _write_sharded(parallel, folder, tensors))
            return None
        if parallel.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copy, in a stream of its own, must find the update done
        self._copied.clear()
        return tensors

    def _copy(self, parallel: Parallel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory; from then on they may change."""
        return self.staging.copy(tensors, parallel.device)

    def _in_background(self, parallel: Parallel, partial: Path, step: int, tensors: dict[str, Tensor]) -> None:
        """The thread of a save: whatever ends it is kept for the main thread."""
        try:
            self._commit(parallel, partial, step, tensors)
        except BaseException as error:
            self._broken, self._outcome = error, Outcome(step, f"{type(error).__name__}: {error}")
        finally:
            self._copied.set()

    def _commit(self, parallel: Parallel, partial: Path, step: int, tensors: dict[str, Tensor] | None) -> None:
        """The part of a save that may run in the background: the tensors, digest, mark, rename, prune."""

        def copy() -> dict[str, Tensor]:
            try:
                return self._copy(parallel, tensors or {})
            finally:
                self._copied.set()

        try:
            if tensors is not None:
                copies = _together(parallel, copy)
                _together(parallel, lambda: _write_sharded(parallel, partial / "tensors", copies))
            files: dict[str, tuple[int, str]] = {}
            for share in parallel.gather(_together(parallel, lambda: _digest(parallel, partial)), background=True):
                files.update(share)
            marker = Marker(step, parallel.checkpoint_format, parallel.settings.strategy, parallel.world_size, files)
            _together(parallel, lambda: self._publish(parallel, partial, marker))
        except SaveError as error:
            self._give_up(parallel, partial, step, error)
        else:
            self._outcome = Outcome(step)

    def _publish(self, parallel: Parallel, partial: Path, marker: Marker) -> None:
        if not parallel.is_main:
            return
        marker.write(partial)
        final = folder_of(self.folder, marker.step)
        replaced = final.with_suffix(".replaced")
        if final.exists():  # the same step again; should this be cut short, `latest` takes the old one back
            final.rename(replaced)
        partial.rename(final)
        _sync_folder(self.folder)
        self.written(marker.step)
        remove(replaced)
        self._prune(marker.step)

    def _prune(self, written: int) -> None:
        """Remove the checkpoints before the one of step `written` that neither `keep` nor a milestone holds.

        Later ones do not count: they are of a past that the run went back from, or whoever left them knows why.
        """
        before = [(step, folder) for step, folder in committed(self.folder) if step <= written]
        counted = [(step, folder) for step, folder in before if step not in self.held]
        for step, folder in counted[: -self.keep]:
            if not (self.milestone_every and step % self.milestone_every == 0):
                remove(folder)

    def _give_up(self, parallel: Parallel, partial: Path, step: int, error: SaveError) -> None:
        self.failures += 1
        self._outcome, self._told = Outcome(step, str(error)), False
        if parallel.is_main:
            remove(partial)

    # loading --------------------------------------------------------------------------------------------------------

    def latest(self, parallel: Parallel) -> Path | None:
        """The newest checkpoint that is whole, or None; collective. Damaged ones are set aside with a message."""
        self.wait()
        if parallel.is_main:
            self._tidy()
        names = parallel.gather([folder.name for _, folder in reversed(committed(self.folder))], background=True)[0]
        for name in names:
            with parallel.busy(f"verifying {name}"):
                fault = verify(self.folder / name, parallel.rank, parallel.world_size)
                faults = parallel.gather(fault, background=True)
            fault = next((f for f in faults if f is not None), None)
            if fault is None:
                return self.folder / name
            if parallel.is_main:
                aside = _set_aside(self.folder / name)
                self.report(f"{self.folder / name}: passed over, {fault}; set aside as {aside.name}")
        return None

    def _tidy(self) -> None:
        """Take back what was being replaced, and remove what else a save or a conversion left when it was cut short."""
        for left in self.folder.glob("step-*.replaced"):
            if not left.with_suffix("").exists():
                self.report(f"{left}: its replacement was interrupted; taken back")
                left.rename(left.with_suffix(""))
        for kind in ("partial", "replaced", "consolidated"):
            for left in self.folder.glob(f"step-*.{kind}"):
                self.report(f"{left}: left by a save that was interrupted; removed")
                remove(left)

    def load(self, parallel: Parallel, path: Path) -> dict[str, Any]:
        """Fill model, optimizer and this rank's generators from `path`; returns the trainer's state. Collective.

        Any strategy and number of ranks reads any checkpoint. Generators are restored for the number of ranks that
        wrote them; otherwise they are seeded anew from the seed, the step and the rank.
        Raises UserError where the checkpoint is of another model.
        """
        marker = Marker.read(path)
        native = marker.format == parallel.checkpoint_format
        if native and marker.format == "deepspeed":
            native = (marker.strategy, marker.world_size) == (parallel.settings.strategy, parallel.world_size)
        with parallel.busy(f"loading {path.name}"):
            if native and marker.format == "deepspeed":
                parallel.load_native(path / "tensors")
            elif native:
                _load_sharded(parallel, path / "tensors")
            elif marker.format == "consolidated":
                _load_consolidated(parallel, path / "tensors")
            else:
                self._load_converted(parallel, path)
        own = path / f"random-{parallel.rank:05d}.pt"
        if marker.world_size == parallel.world_size and own.is_file():
            set_random_state(torch.load(own, weights_only=True))
        else:
            torch.manual_seed(((parallel.seed * 1_000_003 + marker.step) * 1_000_003 + parallel.rank) % 2**63)
        return json.loads((path / "state.json").read_text(encoding="utf-8"))

    def _load_converted(self, parallel: Parallel, path: Path) -> None:
        """Another strategy or number of ranks than the shards can serve: rank 0 consolidates them first."""
        between = path.with_suffix(".consolidated")
        if parallel.is_main:
            self.report(f"{path}: converted for {parallel.settings.strategy} on {parallel.world_size} ranks")
        parallel.on_main(f"converting {path.name}", lambda: convert(path, between, "consolidated"))
        _load_consolidated(parallel, between / "tensors")
        parallel.gather(None, background=True)  # every rank has read it
        if parallel.is_main:
            remove(between)


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither counted nor lost; returns its new place."""
    number, aside = 1, folder.with_suffix(".damaged")
    while aside.exists():
        number += 1
        aside = folder.with_suffix(f".damaged-{number}")
    return folder.rename(aside)


def _begin(parallel: Parallel, partial: Path, state: dict[str, Any]) -> None:
    if parallel.is_main:
        remove(partial)
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        config: Any = getattr(parallel.module, "config", None)
        if config is not None:
            (partial / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def _digest(parallel: Parallel, folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of this rank's share of the files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())[parallel.rank :: parallel.world_size]
    return {str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in files}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_sharded(parallel: Parallel, folder: Path, tensors: dict[str, Tensor]) -> None:
    group = parallel.background_group
    dcp.save(tensors, checkpoint_id=folder, process_group=group, no_dist=group is None)


def _together(parallel: Parallel, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it failed on any, in whatever way, raise SaveError on all with ranks and causes.

    `action` must meet no other rank, or fail on all alike: a rank that fails comes here at once.
    """
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as failure:
        error = _in_words(failure, parallel.rank)
    errors = parallel.gather(error, background=True)
    if any(e is not None for e in errors):
        raise SaveError("; ".join(f"rank {rank}: {e}" for rank, e in enumerate(errors) if e))
    return result  # type: ignore[return-value]


def _in_words(failure: BaseException, rank: int) -> str:
    """A failure in one line. The trace of what no disk explains goes to stderr, for it is a fault of the program."""
    if isinstance(failure, CheckpointException):  # the same on every rank: each tells its own part
        own = failure.failures.get(rank)
        return _in_words(own[0], rank) if own else ""
    if disk := disk_error(failure):
        return disk
    traceback.print_exception(failure, file=sys.stderr)
    return f"{type(failure).__name__}: {failure}"


# generators -----------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """State of this process's generators: python, numpy, torch on the CPU and on the current accelerator."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (libraries draw from the global generator)
    name, keys, *rest = numpy_state
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `random_state` returned `state`."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# tensors --------------------------------------------------------------------------------------------------------------
# Names in every format: `model/<name>` and `optimizer/<parameter name>/<state key>`.


def named_tensors(parallel: Parallel) -> dict[str, Tensor]:
    """Model and optimizer of a running strategy under the names of a checkpoint."""
    tensors = {f"model/{name}": tensor for name, tensor in parallel.model_tensors().items()}
    tensors.update((f"optimizer/{name}/{key}", t) for (name, key), t in parallel.optimizer_tensors().items())
    return tensors


def _allocate(parallel: Parallel, shapes: dict[str, torch.Size], path: Path) -> None:
    """Check that the checkpoint is of this model, then make room for its optimizer state."""
    here = {f"model/{name}": shape for name, shape in parallel.model_shapes().items()}
    there = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{path}: of another model: {name.removeprefix('model/')} is {there.get(name, 'absent')} in the "
                f"checkpoint and {here.get(name, 'absent')} here; give its configuration, or another run_dir"
            )
    states = {}
    for name, shape in shapes.items():
        if name.startswith("optimizer/"):
            _, parameter, key = name.split("/")
            states[parameter, key] = shape
    parallel.allocate_optimizer_state(states)


def _sharded_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    try:
        entries = read_metadata(folder / ".metadata").state_dict_metadata
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    return {n: (e.size, e.properties.dtype) for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _load_sharded(parallel: Parallel, folder: Path) -> None:
    shapes = _sharded_shapes(folder)
    _allocate(parallel, {current_name(name): shape for name, (shape, _) in shapes.items()}, folder)
    stored, tensors = {current_name(name): name for name in shapes}, named_tensors(parallel)
    wanted = {stored.get(name, name): tensor for name, tensor in tensors.items()}
    dcp.load(wanted, storage_reader=SafeReader(folder), process_group=parallel.background_group)


def _load_consolidated(parallel: Parallel, folder: Path) -> None:
    with ExitStack() as stack:
        readers = {}
        for path in (folder / "model.safetensors", folder / "optimizer.safetensors"):
            file = stack.enter_context(safe_open(path, framework="pt"))
            readers.update(dict.fromkeys(file.keys(), file))
        shapes = {current_name(n): torch.Size(f.get_slice(n).get_shape()) for n, f in readers.items()}
        _allocate(parallel, shapes, folder)
        for name, file in sorted(readers.items()):
            kind, parameter, *key = current_name(name).split("/")
            if kind == "model":
                parallel.set_model_tensor(parameter, file.get_tensor(name))
            else:
                parallel.set_optimizer_tensor(parameter, key[0], file.get_tensor(name))


# conversion, without ranks --------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of any format, whole, in host memory, by name."""
    folder, format = path / "tensors", Marker.read(path).format
    if format == "deepspeed":
        tensors = read_deepspeed(folder)
    elif format == "consolidated":
        tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    else:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in _sharded_shapes(folder).items()}
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    return {current_name(name): tensor for name, tensor in tensors.items()}


def convert(source: Path, target: Path, format: Literal["consolidated", "sharded"]) -> None:
    """Write checkpoint `source`, of any strategy, to folder `target` in a form that every strategy and world reads."""
    marker, tensors = Marker.read(source), read_tensors(source)
    remove(target)
    (target / "tensors").mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name != MARKER:
            shutil.copy2(path, target / path.name)
    if format == "sharded":
        dcp.save(tensors, checkpoint_id=target / "tensors", no_dist=True)
    else:
        for kind in ("model", "optimizer"):
            part = {name: t.contiguous() for name, t in tensors.items() if name.startswith(f"{kind}/")}
            save_file(part, target / "tensors" / f"{kind}.safetensors")
    files = {str(p.relative_to(target)): (p.stat().st_size, _sha256(p)) for p in target.rglob("*") if p.is_file()}
    Marker(marker.step, format, marker.strategy, marker.world_size, files).write(target)


def export(source: Path, target: Path, tokenizer: Path | None = None, line: dict[str, Any] | None = None) -> None:
    """Write the model of checkpoint `source` as a `from_pretrained` folder, with its tokenizer if a file is given.

    It is written beside and renamed when whole. line: of the run's metrics, for the model card; None: its last.
    """
    from model.config import MoRConfig
    from model.folder import model_card, write_folder
    from model.modeling import MoRForCausalLM

    config = MoRConfig.from_json_file(source / "config.json")
    model = MoRForCausalLM(config)
    weights = {name.removeprefix("model/"): t for name, t in read_tensors(source).items() if name.startswith("model/")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(dict(model.named_parameters())) - set(dict(model.named_buffers()))
    if unexpected or set(missing) - tied:
        raise UserError(f"{source}: weights do not fit its config.json: {sorted(set(missing) - tied) + unexpected}")
    partial, replaced = (target.with_name(f"{target.name}.{kind}") for kind in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    write_folder(model, partial, tokenizer, model_card(model, run_facts(source.parent.parent, line)))
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """`python -m pretrain.checkpoint convert|export|verify ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoint", description="Convert, export or verify a checkpoint."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="to a form that any strategy on any number of ranks resumes from")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--to", choices=["consolidated", "sharded"], default="consolidated")
    command = commands.add_parser("export", help="to a folder for from_pretrained")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--tokenizer", type=Path, help="tokenizer.json to put beside the model")
    command = commands.add_parser("verify", help="hold every file against its size and sha256")
    command.add_argument("source", type=Path)
    options = parser.parse_args(arguments)
    if fault := verify(options.source):
        raise UserError(f"{options.source}: {fault}; use another checkpoint of the run")
    if options.command == "verify":
        print(f"{options.source}: whole")
        return
    if options.target.exists():
        raise UserError(f"{options.target}: exists already; name a new folder")
    if options.command == "convert":
        convert(options.source, options.target, options.to)
    else:
        export(options.source, options.target, options.tokenizer)
    print(f"wrote {options.target}")


if __name__ == "__main__":
    run_command(main)
