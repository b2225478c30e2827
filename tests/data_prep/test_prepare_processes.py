"""The preparation as a user runs it: worker processes, exit codes, kills at any moment, memory. Slow tests."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from data_prep import engine
from data_prep.config import DataSettings
from data_prep.manifest import read_manifest
from data_prep.prepare import prepare
from data_prep.settings import UserError, load
from data_prep.synthetic import synthetic_documents

COMMAND = [sys.executable, "data_prep/prepare.py"]


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """Arguments for a corpus of 6 MB in two files, more than is done without processes, with repeated documents."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = list(synthetic_documents(6500, seed=0))
    for name, some in (("a", texts[:5000]), ("b", [*texts[:1000], *texts[5000:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    config = folder.with_suffix(".yaml")
    config.write_text(
        "{corpus: sized, sequence_length: 64, shard_bytes: 600000, part_bytes: 400000, tokenizer: {vocab_size: 512, "
        f"train_bytes: 500000}}, source: {{kind: jsonl, paths: ['{folder}']}}}}"
    )
    return ["--config", config]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sized):
    """A folder prepared by one process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = command(*sized, f"folder={folder}", "workers=1")
    assert result.returncode == 0, result.stderr
    assert "unigram loss" in result.stdout
    return folder


@pytest.mark.slow
def test_three_tasks_write_the_bytes_of_one(tmp_path, sized, whole):
    result = command(*sized, f"folder={tmp_path / 'out'}", "workers=3")
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(whole)
    assert len(list((whole / "train").glob("*.tar"))) > 3
    assert read_manifest(whole)["documents"]["dropped_duplicate"] == 1000


@pytest.mark.slow
def test_a_preparation_killed_ten_times_ends_with_the_same_bytes(tmp_path, sized, whole):
    """Kills, drawn by seed, of the whole preparation or of one of its tasks, each after a few more parts."""
    target, drawn = tmp_path / "out", random.Random(16)
    kills = drawn.sample(["whole", "whole", "task", "task", "task", "interrupt"] * 2, 10)
    while True:
        process = subprocess.Popen(
            [*COMMAND, *map(str, sized), f"folder={target}", "workers=2"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        more = len(marks(target)) + drawn.randint(1, 2)
        while kills and len(marks(target)) < more and process.poll() is None:
            time.sleep(0.005)
        time.sleep(drawn.uniform(0, 0.1))
        kill = kills.pop() if kills and process.poll() is None else None
        if kill == "task":
            below = psutil.Process(process.pid).children(recursive=True)
            tasks = [task for task in below if "forkserver" in str(task.cmdline())]
            (drawn.choice(tasks) if tasks else process).kill()
        elif kill is not None:
            process.send_signal(signal.SIGINT if kill == "interrupt" else signal.SIGKILL)
        _, stderr = process.communicate(timeout=200)
        assert not _session(process.pid), "tasks outlive the preparation"
        if process.returncode == 0:  # not killed, or only a task that was idle, or interrupted when all was done
            assert bytes_of(target) == bytes_of(whole)
            if not kills:
                return
            shutil.rmtree(target)
        elif kill == "interrupt":
            assert (process.returncode, "run the same command again" in stderr) == (130, True), stderr
        else:
            assert process.returncode == (2 if kill == "task" and tasks else -signal.SIGKILL), stderr


@pytest.mark.slow
def test_a_server_of_tasks_killed_as_it_starts_is_told_in_one_line(tmp_path, sized, whole, monkeypatch):
    """The moment between its start and that of the first task, which a kill by the clock seldom meets."""
    pytest.importorskip("datatrove")
    from multiprocess.forkserver import _forkserver as server

    start = server.ensure_running

    def start_and_die() -> None:
        start()
        os.kill(server._forkserver_pid, signal.SIGKILL)

    settings = load(DataSettings, str(sized[1]), [f"folder={tmp_path / 'out'}", "workers=2"])
    with monkeypatch.context() as patch:
        patch.setattr(server, "ensure_running", start_and_die)
        with pytest.raises(UserError, match=r"the tasks were ended; .* run the same command again"):
            prepare(settings)
    prepare(settings)
    assert bytes_of(tmp_path / "out") == bytes_of(whole)


CLUSTER = "import ray, sys; ray.init(num_cpus=2, include_dashboard=False, _node_ip_address='127.0.0.1'); "
CLUSTER += "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"


def leads(kind: str, tell: Any) -> None:
    """Leads one task, which runs a program as the sources of packages do, and works on once that has ended; or dies."""
    import multiprocess

    os.register_at_fork(after_in_child=functools.partial(engine._born, tell, os.getpid()))

    def task() -> None:
        subprocess.run(["sleep", "1"], check=True)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2)

    one = multiprocess.get_context("fork").Process(target=task)
    one.start()
    one.join()
    if kind == "killed":
        time.sleep(60)  # as a pool that waits for what a task will never tell
    tell.send(None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ends", "killed"])
def test_a_program_that_a_task_runs_may_end_but_not_the_task(kind, monkeypatch):
    """A preparation of packages was given up ten seconds after the first dpkg-deb that was seen had ended."""
    import multiprocess

    monkeypatch.setattr(engine, "GRACE", 0.5)
    context = multiprocess.get_context("fork")
    told, tell = context.Pipe(duplex=False)
    leader = context.Process(target=leads, args=(kind, tell))
    leader.start()
    tell.close()
    stage: Any = SimpleNamespace(folder="folder", missing=lambda: [1])
    try:
        error = engine._word(stage, leader, psutil.Process(leader.pid), told)
        assert (error is None) if kind == "ends" else "folder: a task died" in str(error)
    finally:
        leader.kill()
        leader.join()


@pytest.mark.slow
@pytest.mark.skipif("RAY_PYTHON" not in os.environ, reason="RAY_PYTHON: a Python that has these packages and ray")
def test_a_ray_cluster_writes_the_bytes_of_one_process_and_says_what_a_task_refused(tmp_path, sized, whole, request):
    """Its workers begin in another folder, so that a relative one has to be told."""
    python = os.environ["RAY_PYTHON"]
    variables = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([python, "-c", CLUSTER], env=variables, cwd=tmp_path, **pipes) as cluster:
        address = cluster.stdout.readline().strip()
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 400_000 + "{\n")
        target = Path("data") / tmp_path.name
        request.addfinalizer(lambda: shutil.rmtree(target, ignore_errors=True))
        for changes, code in ((f"source.paths=[{tmp_path / 'bad.jsonl'}]", 2), ("workers=2", 0)):
            arguments = [*sized, f"folder={target}", "executor=ray", changes]
            done = subprocess.run(
                [python, *COMMAND[1:], *map(str, arguments)],
                env=variables | {"RAY_ADDRESS": address},
                capture_output=True,
                text=True,
            )
            assert done.returncode == code, done.stderr
            if code:
                assert re.search(r"error: \S+bad.jsonl, line \d+ after byte \d+: not JSON", done.stderr), done.stderr
                assert "Traceback" not in done.stderr
                shutil.rmtree(target)
        cluster.stdin.close()
    assert bytes_of(target) == bytes_of(whole)


def marks(folder: Path) -> list[Path]:
    return list((folder / "work").glob("*/*.json"))


def _session(leader: int) -> list[int]:
    """Living processes of the session that `leader` began, given a moment to end."""
    for _ in range(50):
        alive = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                alive.append(int(path.parent.name))
        if not alive:
            return []
        time.sleep(0.1)
    return alive


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    texts = list(synthetic_documents(2000, seed=0))
    sizes, peaks = [], []
    for documents in (12_000, 40_000):  # 9 and 31 MB; each text is made distinct
        corpus = tmp_path / f"{documents}.jsonl"
        with corpus.open("w") as file:
            file.writelines(f'{{"text": "{number}: {texts[number % len(texts)]}"}}\n' for number in range(documents))
        sizes.append(corpus.stat().st_size)
        peaks.append(_peak_memory(corpus, tmp_path / f"prepared-{documents}"))
    # What may grow is the allocator's slack. The mapped files do not count.
    assert sizes[1] - sizes[0] > 20e6
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3, (sizes, peaks)


def _peak_memory(corpus: Path, folder: Path) -> int:
    """Largest private memory, in bytes, of a preparation by one process (mapped files are not private)."""
    script = (
        "import sys, threading, time, psutil\n"
        "from data_prep import documents, shuffle\n"
        "from data_prep.prepare import main\n"
        "shuffle.BUCKET_BYTES, documents.RANGE_ROWS = 1 << 20, 1 << 12\n"  # small as these corpora
        "peak = 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        info = psutil.Process().memory_info()\n"
        "        peak = max(peak, info.rss - info.shared)\n"
        "        time.sleep(0.01)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "main(sys.argv[1:])\n"
        "print('peak', peak)\n"
    )
    arguments = [f"folder={folder}", "source.kind=jsonl", f"source.paths=[{corpus}]", "corpus=x", "sequence_length=256"]
    arguments.append("shard_bytes=1000000")
    config = corpus.parent / "config.yaml"
    config.write_text("tokenizer: {vocab_size: 600, train_bytes: 500000}\npart_bytes: 1000000\n")
    result = subprocess.run(
        [sys.executable, "-c", script, "--config", str(config), *arguments, "workers=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("peak")[1])


@pytest.mark.slow
def test_mistakes_at_the_command_line_end_with_code_2_and_one_message(tmp_path):
    smoke = ["--config", "configs/data/smoke.yaml"]
    (tmp_path / "text.yaml").write_text(
        "{corpus: x, sequence_length: 8, source: {kind: text, paths: [nowhere]}, tokenizer: {vocab_size: 300}}"
    )
    for arguments, message in [
        (["--config", "configs/data/smok.yaml"], "configs/data/smok.yaml: no such file; did you mean smoke.yaml"),
        ([*smoke, "sourse.documents=3"], "unknown key 'sourse'; nearest valid: source"),
        ([*smoke, "source.documents=many"], "source.documents: "),
        ([*smoke, "tokenizer.vocab_size=100"], "tokenizer.vocab_size: Input should be greater than or equal to 257"),
        (["--config", tmp_path / "text.yaml"], "nowhere: no such file"),
        (["--verify", tmp_path], "no manifest.json: not a prepared folder"),
    ]:
        result = command(*arguments, *([] if arguments[0] == "--verify" else [f"folder={tmp_path / 'out'}"]))
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert "Traceback" not in result.stderr
