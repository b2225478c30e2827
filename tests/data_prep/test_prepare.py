"""The whole preparation, in this process: same bytes always, no leak between splits, nothing half done, clear refusals.

What needs processes of its own (workers, signals, memory) is in test_prepare_processes.py.
"""

import errno
import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import prepare as prepare_module
from data_prep import stages
from data_prep.files import fingerprint
from data_prep.manifest import read_manifest, unigram_loss, verify
from data_prep.prepare import main, prepare
from data_prep.settings import UserError, load
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
    assert manifest["unigram_loss"] == pytest.approx(expected, rel=1e-12)
    assert unigram_loss([0, 0, 0, 0], [1, 1, 0, 0]) == pytest.approx(math.log(4))


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


@pytest.mark.parametrize("name", ["sotu", "smoke", "prose", "fineweb_edu_dedup"])
def test_every_configuration_is_valid(name):
    settings = load(prepare_module.DataSettings, f"configs/data/{name}.yaml")
    assert settings.folder == f"data/{name}"
