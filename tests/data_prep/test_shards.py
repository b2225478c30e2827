"""Shards: plain webdataset and datasets read them, the index points to the tokens, equal blocks give equal bytes."""

import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.files import sha256_of
from data_prep.settings import UserError
from data_prep.shards import samples_per_member, samples_per_shard, write_shards

BLOCKS = np.random.default_rng(0).integers(0, 60_000, (500, 33)).astype("<u2")
TWO_BYTES = np.dtype("<u2")
SHARD_BYTES = 14_336 + 1024 + 1024  # one full member, one with five samples, and the end


@pytest.fixture
def shards(tmp_path):
    """Three tars, of which the last is smaller, from arrays whose lengths do not match."""
    arrays = np.split(BLOCKS, [70, 300])
    return list(write_shards(arrays, tmp_path, "train", SHARD_BYTES))


def test_tars_are_bounded_and_described(tmp_path, shards):
    full = samples_per_member(33, TWO_BYTES)
    assert [shard.samples for shard in shards] == [212, 212, 76]
    assert full == 207
    assert [shard.name for shard in shards] == [f"train/shard-{number:06d}.tar" for number in range(3)]
    for shard in shards:
        path = tmp_path / shard.name
        assert path.stat().st_size == shard.bytes <= SHARD_BYTES
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
    assert [member.name for member in members] == ["000000000212.tokens.npy", "000000000419.tokens.npy"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_plain_webdataset_reads_them(tmp_path, shards):
    import webdataset

    urls = [str(tmp_path / shard.name) for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [int(sample["__key__"]) for sample in samples] == [0, 207, 212, 419, 424]
    assert np.array_equal(np.concatenate([sample["tokens.npy"] for sample in samples]), BLOCKS)


def test_the_datasets_library_reads_them(tmp_path, shards):
    import datasets

    urls = [str(tmp_path / shard.name) for shard in shards]
    rows = datasets.load_dataset("webdataset", data_files={"train": urls}, split="train", streaming=True)
    assert np.array_equal(np.concatenate([np.asarray(row["tokens.npy"]) for row in rows]), BLOCKS)


def test_a_shard_too_small_for_a_sample_is_refused_with_a_size_that_works():
    with pytest.raises(UserError, match=r"shard_bytes=2000 is too small .*sequence_length=32; set it to 2048"):
        samples_per_shard(33, TWO_BYTES, 2000)
    assert samples_per_shard(33, TWO_BYTES, 2048) == 5  # what fits beside the headers


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40_000), st.sampled_from(["<u2", "<u4"]), st.integers(1, 60))
def test_a_tar_of_any_sequence_length_is_little_larger_than_its_tokens(tmp_path_factory, width, dtype, more):
    dtype = np.dtype(dtype)
    per_member = samples_per_member(width, dtype)
    blocks = np.zeros((min(3 * per_member, 2_000_000 // width + 1), width), dtype)
    if len(blocks) == 3 * per_member:
        (shard,) = write_shards([blocks], tmp_path_factory.mktemp("tar"), "train", 1 << 30)
        assert shard.bytes - 1024 <= 1.06 * blocks.nbytes
    limit = samples_per_shard(width, dtype, 3 * blocks.nbytes + 4096 + 999 * more)
    part = np.zeros((min(limit, 2_000_000 // width + 1), width), dtype)
    (shard, *_) = write_shards([part], tmp_path_factory.mktemp("tar"), "train", 3 * blocks.nbytes + 4096 + 999 * more)
    assert shard.bytes <= 3 * blocks.nbytes + 4096 + 999 * more
