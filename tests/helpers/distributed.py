"""Run a function on several ranks over gloo, in one line, and survive whatever the ranks do.

    losses = run_ranks(train, 2, config)          # one return value for each rank
    ranks = start_ranks(train, 2, config)         # or: look on, kill, wait
    ranks.kill(1)
    codes = ranks.wait(60)

Ranks are forked from a server process that has imported torch, DeepSpeed and the trainer once, so a launch takes a
second in place of half a minute. They get the environment that torchrun gives; as under torchrun, when one fails the
others are ended. Real launchers are tested beside this, in tests/pretrain/test_parallel.py.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.settings import UserError

GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
PRELOAD = ["torch", "transformers", "deepspeed", "pretrain.trainer", "torch.distributed.checkpoint"]
# DeepSpeed's engine imports this as it starts, and with it torch's compiler: three seconds of every rank.
PRELOAD += ["deepspeed.runtime.zero.muon.muon_optimizer"]


class Ranks:
    """Processes that were started together."""

    def __init__(self, processes: list[Any], folder: Path) -> None:
        self.processes, self.folder = processes, folder

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks; none named: all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def wait(self, timeout: float) -> list[int | None]:
        """Exit codes, by rank. When one has failed, or time is over, the rest is killed."""
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What a rank has written to stdout and stderr."""
        path = self.folder / f"output-{rank}"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def results(self) -> list[Any]:
        """What the function returned, by rank."""
        return [pickle.loads((self.folder / f"result-{rank}").read_bytes()) for rank in range(len(self.processes))]


def start_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, environment: Mapping[str, str] | None = None
) -> Ranks:
    """Start `function(*arguments)`, a function of a module, on every rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    module = sys.modules[function.__module__]
    name = (str(module.__file__), function.__qualname__)
    port = _free_port()
    processes = []
    for rank in range(world_size):
        variables = _variables(rank, world_size, port) | dict(environment or {})
        process = context.Process(target=_run, args=(name, rank, variables, folder, pickle.dumps(arguments)))
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 400,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Start, wait, and return what each rank returned. A rank that fails makes it fail, with that rank's output."""
    ranks = start_ranks(function, world_size, *arguments, environment=environment)
    codes = ranks.wait(timeout)
    outputs = "\n".join(f"--- rank {r}, exit code {code}\n{ranks.output(r)[-3000:]}" for r, code in enumerate(codes))
    assert codes == [0] * world_size, outputs
    return ranks.results()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run(name: tuple[str, str], rank: int, variables: dict[str, str], folder: Path, arguments: bytes) -> None:
    """What a rank does: output to its file, the launcher's environment, the function, its result to a file."""
    gc.freeze()  # no collection of garbage goes through what the server has imported
    log = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(variables)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    import torch

    torch.set_num_threads(1)
    try:
        result = _load(*name)(*pickle.loads(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


def _load(path: str, function: str) -> Callable[..., Any]:
    """Test modules have no importable name under pytest's importlib mode; load them by their path."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("rank_functions", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_functions"] = module
    spec.loader.exec_module(module)
    return getattr(module, function)
