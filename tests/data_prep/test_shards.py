"""Shards: plain webdataset and datasets read them, the index points to the tokens, equal blocks give equal bytes."""

import tarfile

import numpy as np
import pytest

from data_prep.files import sha256_of
from data_prep.settings import UserError
from data_prep.shards import samples_per_shard, write_shards

BLOCKS = np.random.default_rng(0).integers(0, 60_000, (50, 33)).astype("<u2")


@pytest.fixture
def shards(tmp_path):
    """Three tars of 20, 20 and 10 samples, from arrays whose lengths do not match."""
    arrays = np.split(BLOCKS, [7, 30])
    return list(write_shards(arrays, tmp_path, "train", shard_bytes=1024 + 20 * 1024))


def test_tars_are_bounded_and_described(tmp_path, shards):
    assert [shard.samples for shard in shards] == [20, 20, 10]
    assert [shard.name for shard in shards] == [f"train/shard-{number:06d}.tar" for number in range(3)]
    for shard in shards:
        path = tmp_path / shard.name
        assert path.stat().st_size == shard.bytes <= 1024 + 20 * 1024
        assert sha256_of(path) == shard.sha256


def test_the_index_points_to_the_tokens(tmp_path, shards):
    found = []
    for shard in shards:
        content = np.memmap(tmp_path / shard.name, np.uint8, "r")
        for offset in np.load((tmp_path / shard.name).with_suffix(".idx.npy")):
            found.append(content[offset : offset + 66].view("<u2"))
    assert np.array_equal(np.stack(found), BLOCKS)


def test_tar_reads_them_with_nothing_that_varies(tmp_path, shards):
    with tarfile.open(tmp_path / shards[1].name) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [f"{number:012d}.tokens.npy" for number in range(20, 40)]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_plain_webdataset_reads_them(tmp_path, shards):
    import webdataset

    urls = [str(tmp_path / shard.name) for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:012d}" for number in range(50)]
    assert np.array_equal(np.stack([sample["tokens.npy"] for sample in samples]), BLOCKS)


def test_the_datasets_library_reads_them(tmp_path, shards):
    import datasets

    urls = [str(tmp_path / shard.name) for shard in shards]
    rows = datasets.load_dataset("webdataset", data_files={"train": urls}, split="train", streaming=True)
    assert np.array_equal(np.stack([np.asarray(row["tokens.npy"]) for row in rows]), BLOCKS)


def test_a_shard_too_small_for_a_sample_is_refused_with_a_size_that_works():
    with pytest.raises(UserError, match=r"shard_bytes=2000 is too small .*sequence_length=32; set it to 2048"):
        samples_per_shard(33, np.dtype("<u2"), 2000)
    assert samples_per_shard(33, np.dtype("<u2"), 2048) == 1
