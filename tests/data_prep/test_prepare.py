"""The whole preparation, in this process: same bytes always, no leak between splits, nothing half done, clear refusals.

What needs processes of its own (workers, signals, memory) is in test_prepare_processes.py.
"""

import errno
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from data_prep import documents, estimate, progress, stages
from data_prep import prepare as prepare_module
from data_prep.files import fingerprint
from data_prep.manifest import read_manifest, unigram_loss, verify
from data_prep.prepare import main, prepare
from data_prep.settings import UserError, load, read_yaml
from data_prep.synthetic import synthetic_documents
from tests.helpers.corpus import prepare_tiny, tiny_settings

KEYS = {
    *("version", "sequence_length", "token_dtype", "vocab_size", "eos_token_id", "tokenizer_fingerprint", "source"),
    *("inputs", "corpus", "licence", "seed", "documents", "unigram_loss", "splits", "fingerprint", "tools"),
    *("samples_per_member", "unknown_tokens", "document_lengths", "repeated_documents"),
}


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blocks_of(folder, split):
    found = []
    for tar in sorted((folder / split).glob("*.tar")):
        content = np.fromfile(tar, np.uint8)
        found += [content[at : at + 66].view("<u2") for at in np.load(tar.with_suffix(".idx.npy"))]
    return np.stack(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished folder with several shards; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("prepared") / "tiny"
    prepare_tiny(folder, shard_bytes=15_000)
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder of text files, one document each."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(f"This is document number {number}. " * 10)
    return tmp_path / "texts"


def settings_for(texts, folder, **changes):
    source = {"kind": "text", "paths": [str(texts)]}
    return tiny_settings(folder, source=source, tokenizer={"vocab_size": 270}, **changes)


def test_the_manifest_states_what_the_folder_holds(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == KEYS
    assert manifest.pop("fingerprint") == fingerprint(manifest)
    assert (manifest["token_dtype"], manifest["vocab_size"], manifest["eos_token_id"]) == ("uint16", 300, 0)
    for split in ("train", "validation"):
        content = manifest["splits"][split]
        blocks = blocks_of(folder, split)
        assert blocks.shape == (content["samples"], 33)
        assert content["tokens"] == blocks.size
        assert sum(shard["samples"] for shard in content["shards"]) == content["samples"]
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert {path.name for path in folder.iterdir()} == {"train", "validation", "tokenizer.json", "manifest.json"}


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path, folder):
    prepare_tiny(tmp_path / "again", shard_bytes=15_000)
    prepare_tiny(tmp_path / "other", shard_bytes=15_000, seed=1)
    assert bytes_of(tmp_path / "again") == bytes_of(folder)
    assert not np.array_equal(blocks_of(tmp_path / "other", "validation"), blocks_of(folder, "validation"))


def test_train_and_validation_share_no_document_and_lose_none(texts, tmp_path):
    prepare(settings_for(texts, tmp_path / "out"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    sides = []
    for split in ("train", "validation"):
        text = " ".join(tokenizer.decode(block.tolist()) for block in blocks_of(tmp_path / "out", split))
        sides.append({number for number in range(40) if f"number {number}." in text})
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) > 36  # a document may lie wholly in the dropped rest of a split


def test_unigram_loss_is_the_cross_entropy_of_the_smoothed_counts(folder):
    manifest = read_manifest(folder)
    train, validation = (blocks_of(folder, split)[:, 1:].ravel() for split in ("train", "validation"))
    expected = np.mean([-math.log((np.sum(train == token) + 1) / (train.size + 300)) for token in validation])
    assert manifest["unigram_loss"] == pytest.approx(expected, abs=1e-9)
    assert unigram_loss([0, 0, 0, 0], [1, 1, 0, 0]) == pytest.approx(math.log(4))


def test_another_rounding_of_logarithms_is_the_same_data(monkeypatch):
    """Two CPUs gave 5.278381430024046 and ...047 for the same counts, and so the same bytes two fingerprints."""
    counts = np.random.default_rng(0).integers(0, 1000, (2, 512)).tolist()
    expected, log = unigram_loss(*counts), np.log
    monkeypatch.setattr(np, "log", lambda x: log(x) * (1 + 1e-15))
    assert unigram_loss(*counts) == expected


def test_a_finished_folder_is_left_alone(folder, monkeypatch):
    before = bytes_of(folder)
    monkeypatch.setattr(prepare_module, "open_corpus", None)  # would fail if it were called
    prepare_tiny(folder, shard_bytes=15_000)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("stopped_at", stages.STAGES)
def test_work_stopped_at_any_stage_continues_and_nothing_looks_finished(tmp_path, folder, monkeypatch, stopped_at):
    original, begun = prepare_module.run_stage, []

    def run_stage(settings, name):
        original(settings, name)
        begun.append(name)
        if name == stopped_at:
            raise KeyboardInterrupt

    target = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "run_stage", run_stage)
        with pytest.raises(KeyboardInterrupt):
            prepare_tiny(target, shard_bytes=15_000)
    assert read_manifest(target) is None
    with pytest.raises(UserError, match="not a prepared folder, or its preparation was not finished"):
        verify(target)
    ran = []
    for name, stage in stages.STAGES.items():
        monkeypatch.setattr(stage, "run", recorded(stage.run, name, ran))
    prepare_tiny(target, shard_bytes=15_000)
    assert not set(ran) & set(begun) and len(begun) + len(set(ran)) == len(stages.STAGES)
    assert bytes_of(target) == bytes_of(folder)


def recorded(run, name, ran):
    def wrapped(self, part):
        ran.append(name)
        return run(self, part)

    return wrapped


def test_a_full_disk_is_reported_and_the_work_kept(tmp_path, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shards._write_shard", full)
        with pytest.raises(UserError, match=r"full: no space left on the disk; finished stages are kept in .*work"):
            prepare_tiny(target, shard_bytes=15_000)
    assert (target / "work" / "scatter.json").exists()
    prepare_tiny(target, shard_bytes=15_000)
    assert bytes_of(target) == bytes_of(folder)


def test_a_corpus_that_changed_since_the_interruption_is_read_anew(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stages.TokenizerStage, "run", lambda self, part: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(settings_for(texts, tmp_path / "out"))
    (texts / "99.txt").write_text("One more document, which was not there before.")
    assert (
        sum(prepare(settings_for(texts, tmp_path / "out"))["documents"][split] for split in ("train", "validation"))
        == 41
    )


def test_a_folder_of_another_configuration_is_refused_with_the_keys(texts, tmp_path, folder, monkeypatch):
    with pytest.raises(
        UserError, match=r"tiny: belongs to another configuration \(sequence_length: 32 there, 16 asked"
    ):
        prepare_tiny(folder, sequence_length=16, shard_bytes=15_000)
    with monkeypatch.context() as patch:
        patch.setattr(stages.TokenizerStage, "run", lambda self, part: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(settings_for(texts, tmp_path / "out"))
    with pytest.raises(
        UserError, match=r"out: unfinished work there belongs to another configuration \(seed: 0 there, 1 asked"
    ):
        prepare(settings_for(texts, tmp_path / "out", seed=1))
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    with pytest.raises(UserError, match="holiday: holds files but no prepared data"):
        prepare(settings_for(texts, tmp_path / "holiday"))
    assert (tmp_path / "holiday" / "photo.jpg").exists()


def test_too_little_text_for_one_block_and_too_small_shards_are_refused(texts, tmp_path):
    with pytest.raises(UserError, match=r"its train split has \d+ tokens, one block needs 5001"):
        prepare(settings_for(texts, tmp_path / "a", sequence_length=5000))
    with pytest.raises(UserError, match=r"shard_bytes=100 is too small"):
        prepare(settings_for(texts, tmp_path / "b", shard_bytes=100))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-600])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train/shard-000001.tar", _flip, r"train/shard-000001.tar: altered: sha256 differs"),
        ("validation/shard-000000.tar", _truncate, r"validation/shard-000000.tar: truncated or altered: \d+ bytes"),
        ("train/shard-000002.tar", lambda path: path.unlink(), r"train/shard-000002.tar: missing"),
        ("train/shard-000000.idx.npy", _truncate, r"shard-000000.tar: its index .* cannot be read"),
        ("train/shard-000000.idx.npy", lambda p: np.save(p, np.load(p) + 2), r"shard-000000.idx.npy does not point"),
        ("tokenizer.json", _flip, r"tokenizer.json: altered"),
        ("tokenizer.json", lambda path: path.unlink(), r"tokenizer.json: missing"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace('"seed": 0', '"seed": 1')), "altered"),
        ("manifest.json", _truncate, "manifest.json: not a manifest of prepared data"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(tmp_path, folder, name, damage, message):
    for path, content in bytes_of(folder).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    verify(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message):
        verify(tmp_path)


def test_the_command_line_prints_settings_with_their_meaning(capsys):
    assert main(["--config", "configs/data/smoke.yaml", "--print-config", "seed=5"]) == 0
    printed = capsys.readouterr().out
    assert "seed = 5\n    seed of the split" in printed
    assert "source.kind = 'synthetic'" in printed


@pytest.mark.parametrize("name", ["sotu", "smoke", "prose"])
def test_every_configuration_is_valid(name):
    settings = load(prepare_module.DataSettings, f"configs/data/{name}.yaml")
    assert settings.folder == f"data/{name}"


# What stands beside the text in the files of each data set.
METADATA = {
    "dump": "CC-MAIN-2020-05",
    "url": "a",
    "language_score": 0.9,
    "token_count": 80,
    "score": 3.1,
    "int_score": 3,
}
LAYOUTS = {
    "fineweb_edu_dedup": {"id": "a", "metadata": METADATA},
    "fineweb_edu_10b": {"id": "a", "file_path": "b", "language": "en", **METADATA},
    "cosmopedia_v2": {"prompt": "p", "token_length": 80, "audience": "b", "format": "f", "seed_data": "d"},
    "tinystories": {},
    "wikitext103": {},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_ready_made_configuration_reads_the_layout_of_its_data_set(tmp_path, name):
    """Parquet files with the columns that the data set's files have, two of them, as its shards are."""
    texts = [f"{number}: {text}" for number, text in enumerate(synthetic_documents(80, seed=0))]
    texts[10:12] = ["", " = A heading = \n"]  # as WikiText's lines
    for number, part in enumerate((texts[:50], texts[50:])):
        table = pyarrow.Table.from_pylist([{"text": text, **LAYOUTS[name]} for text in part])
        parquet.write_table(table, tmp_path / f"train-{number:05d}-of-00002.parquet")
    changes = [f"folder={tmp_path / 'out'}", "workers=1", "sequence_length=32", "validation_fraction=0.25"]
    changes += ["tokenizer.vocab_size=300", "tokenizer.load=null"]
    changes += ["source.name=parquet", "source.config=null", f"source.data_files=['{tmp_path}/*.parquet']"]
    settings = load(prepare_module.DataSettings, f"configs/data/{name}.yaml")
    assert settings.folder == f"data/{name}" and settings.source.kind == "datasets"
    manifest = prepare(load(prepare_module.DataSettings, f"configs/data/{name}.yaml", changes))
    assert (manifest["documents"]["train"] + manifest["documents"]["validation"]) == 79
    assert manifest["licence"] != "unknown" and len(manifest["inputs"]) == 2


def test_a_streamed_data_set_goes_on_within_a_shard(tmp_path, monkeypatch):
    texts = [f"{number}: {text}" for number, text in enumerate(synthetic_documents(90, seed=0))]
    texts[20] = "long " * 1000  # cut into several documents
    for number in range(2):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[45 * number : 45 * (number + 1)])
        (tmp_path / f"{number}.jsonl").write_text(rows)
    source = {"kind": "datasets", "name": "json", "data_files": [str(tmp_path / "*.jsonl")]}
    changes = {"source": source, "max_document_bytes": 2048, "long_documents": "split"}
    prepare(tiny_settings(tmp_path / "whole", **changes))
    monkeypatch.setattr("data_prep.documents.SAVE_SECONDS", 0.0)
    original, seen = documents.decode, []

    def dies(raw):
        seen.append(raw)
        if len(seen) in (30, 60):  # in the first shard, and in the second
            raise KeyboardInterrupt
        return original(raw)

    monkeypatch.setattr(documents, "decode", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(tiny_settings(tmp_path / "killed", **changes))
    prepare(tiny_settings(tmp_path / "killed", **changes))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    documents_of = read_manifest(tmp_path / "whole")["documents"]
    assert documents_of["split_long"] == 1
    assert len(seen) == documents_of["train"] + documents_of["validation"] + documents_of["dropped_duplicate"] + 2


def test_the_smollm_corpus_is_a_mixture_of_ready_made_configurations():
    data = read_yaml("configs/experiment/smollm_corpus.yaml")["data"]
    sources = {name: load(prepare_module.DataSettings, source["prepare"]) for name, source in data["mixture"].items()}
    assert {source["folder"] for source in data["mixture"].values()} == {item.folder for item in sources.values()}
    assert len({(item.tokenizer.load, item.sequence_length) for item in sources.values()}) == 1


def test_room_is_estimated_and_refused_where_it_lacks(texts, tmp_path, monkeypatch, capsys):
    def room(free, available):
        monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    settings = settings_for(texts, tmp_path / "out", workers=3, part_bytes=4096)
    room(10_000, 64e9)
    with pytest.raises(UserError, match=r"about 0.0 GB of text.*at most 0.0 GB of disk.*0.0 GB are free on its disk"):
        prepare(settings)
    assert not (tmp_path / "out" / "work" / "read").exists()
    room(1e12, 0.5e9)
    with pytest.raises(UserError, match=r"0.6 GB for 3; 0.5 GB are free: set workers=2"):
        prepare(settings)
    paper = load(prepare_module.DataSettings, "configs/data/fineweb_edu_dedup.yaml")
    need = estimate.needs(paper, 1.0e12, 14_901, 49_152)  # 220B tokens
    assert 200e9 < need.tokens < 300e9 and 1.0e12 < need.disk < 1.2e12 and need.memory < 2e9


def test_status_tells_each_stage_by_the_marks(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nothing is prepared here"):
        main(["--status", str(out)])
    settings = settings_for(texts, out, part_bytes=4096)
    original = stages.Encode.run

    def second_dies(self, part):
        return 1 / 0 if part == 1 else original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Encode, "run", second_dies)
        with pytest.raises(ZeroDivisionError):
            prepare(settings)
    assert main(["--status", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(stages.STAGES)
    parts = len(list((out / "work" / "read").glob("*.json")))
    assert parts > 2 and f"read: {parts} of {parts} parts" in lines[0] and "bytes/s" in lines[0] and "took" in lines[0]
    assert re.search(rf"encode: 1 of {parts} parts, [\d,]+ of [\d,]+ bytes, .* left", lines[3])
    assert "waits for the stages before it" in lines[4]
    monkeypatch.setattr(progress, "_QUICK", 0.0)
    prepare(settings)
    told = capsys.readouterr().err
    assert re.search(rf"encode: {parts - 1} of {parts} parts, [\d,]+ bytes in 0:\d\d:\d\d, .* bytes/s", told)
    assert main(["--status", str(out)]) == 0 and "finished" in capsys.readouterr().out


def test_inspection_shows_what_the_folder_holds(texts, tmp_path, capsys):
    for name in ("07", "copy-0", "copy-1", "copy-2"):
        (texts / f"{name}.txt").write_text("\x1b[31mred\x1b[0m <script> " + "This is document number 7. " * 20)
    prepare(settings_for(texts, tmp_path / "out"))
    assert main(["--inspect", str(tmp_path / "out"), "--position", "2", "--page", str(tmp_path / "page.html")]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    for shown in (printed, page):
        assert "40 train" in shown or "documents" in shown
        assert "This is document number 7." in shown and "document number" in shown
        assert "train block 2" in shown and "train block 1<" not in shown
        assert "␛[31mred␛[0m" in shown and "\x1b" not in shown
    assert "4 times" in page and "<script" not in page and "http" not in page
    lengths = read_manifest(tmp_path / "out")["document_lengths"]
    assert sum(map(sum, lengths.values())) == 40
    with pytest.raises(UserError, match=r"--position=9999: .*out has train blocks 0 to \d+"):
        main(["--inspect", str(tmp_path / "out"), "--position", "9999"])
