"""The preparation as a user runs it: worker processes, exit codes, kills at any moment, memory. Slow tests."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.synthetic import synthetic_documents

COMMAND = [sys.executable, "data_prep/prepare.py"]
# 5 MB of text: more than is encoded without a pool.
SIZED = ["--config", "configs/data/smoke.yaml", "source.documents=9000", "sequence_length=64", "shard_bytes=2000000"]


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder prepared with one worker, and how many seconds that took."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    result = command(*SIZED, f"folder={folder}", "workers=1")
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert "unigram loss" in result.stdout
    return folder, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, whole, workers):
    result = command(*SIZED, f"folder={tmp_path / 'out'}", f"workers={workers}")
    assert result.returncode == 0, result.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(whole[0])
    assert len(list((whole[0] / "train").glob("*.tar"))) > 3


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(tmp_path, whole, signal_number):
    reference, seconds = whole
    target, delays = tmp_path / "out", random.Random(int(signal_number))
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(
            [*COMMAND, *SIZED, f"folder={target}", "workers=2"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, stderr = process.communicate(timeout=delays.uniform(0.5, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            assert not (target / "manifest.json").exists() or not (target / "work").exists()
            process.send_signal(signal_number)
            _, stderr = process.communicate(timeout=60)
            kills += 1
            if signal_number == signal.SIGINT and process.returncode != 0:
                assert process.returncode == 130, stderr
                assert "run the same command again" in stderr
                assert "Traceback" not in stderr
        assert not _group(process.pid), "worker processes outlive the preparation"
        if process.returncode == 0:
            break
    assert process.returncode == 0, stderr
    assert kills >= 1
    assert bytes_of(target) == bytes_of(reference)


def _group(leader: int) -> list[int]:
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
def test_memory_stays_far_below_the_size_of_the_corpus(tmp_path):
    texts = list(synthetic_documents(2000, seed=0))
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for number in range(60_000):  # about 40 MB; each text is made distinct
            file.write(f'{{"text": "{number}: {texts[number % len(texts)]}"}}\n')
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert size > 30e6
    small = tmp_path / "small.jsonl"
    with small.open("w") as file:
        file.writelines(f'{{"text": "{number}: {texts[number % len(texts)]}"}}\n' for number in range(3000))
    peaks = [_peak_memory(path, tmp_path / path.stem) for path in (small, tmp_path / "corpus.jsonl")]
    # What grows: the trained sample (10 MB), one byte a document, buffers of a bucket. The mapped files do not count.
    assert peaks[1] - peaks[0] < size / 2, peaks


def _peak_memory(corpus: Path, folder: Path) -> int:
    """Largest private memory, in bytes, of a preparation by one process (mapped files are not private)."""
    script = (
        "import sys, threading, time, psutil\n"
        "from data_prep.prepare import main\n"
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
    config = corpus.parent / "config.yaml"
    config.write_text("tokenizer: {vocab_size: 600, train_bytes: 10000000}\n")
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
    for arguments, message in [
        (["--config", "configs/data/smok.yaml"], "configs/data/smok.yaml: no such file; did you mean smoke.yaml?"),
        ([*smoke, "sourse.documents=3"], "unknown key 'sourse'; nearest valid: source"),
        ([*smoke, "source.documents=many"], "source.documents: "),
        ([*smoke, "tokenizer.vocab_size=100"], "tokenizer.vocab_size: Input should be greater than or equal to 257"),
        ([*smoke, "source={kind: text, paths: [nowhere]}"], "nowhere: no such file"),
        (["--verify", tmp_path], "no manifest.json: not a prepared folder"),
    ]:
        result = command(*arguments, *([] if arguments[0] == "--verify" else [f"folder={tmp_path / 'out'}"]))
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert "Traceback" not in result.stderr
