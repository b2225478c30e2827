"""The global shuffle: every whole block once, the order a function of the seed, memory bounded by the bucket."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import shuffle
from data_prep.shuffle import Scattered, cut_blocks, scatter


def shuffled(folder, blocks, seed=0):
    """The blocks of each bucket, in order, by way of all chunks."""
    buckets, rows = cut_blocks(len(blocks), blocks[:1].nbytes)
    chunks = [folder / f"{number}.blocks" for number in range(-(-len(blocks) // rows))]
    for number, path in enumerate(chunks):
        scatter(blocks[number * rows : (number + 1) * rows], number, buckets, seed, path)
    mixed = Scattered(chunks, blocks.shape[1], blocks.dtype, seed)
    begins = mixed.first_rows()
    return mixed, [mixed.rows(number, 0, begins[number + 1] - begins[number]) for number in range(buckets)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 2**63 - 1), st.integers(1, 500))
def test_every_block_comes_once_whatever_the_buckets(tmp_path_factory, count, width, seed, bucket_bytes):
    blocks = np.arange(count * width, dtype="<u2").reshape(count, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
        mixed, arrays = shuffled(tmp_path_factory.mktemp("chunks"), blocks, seed)
    found = np.concatenate(arrays)
    assert np.array_equal(found[np.argsort(found[:, 0])], blocks)
    for bucket, rows in enumerate(arrays):  # a range of a bucket is that part of it
        assert np.array_equal(mixed.rows(bucket, len(rows) // 3, len(rows)), rows[len(rows) // 3 :])


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 2000])
def test_the_order_depends_on_the_seed_and_mixes_the_whole_corpus(tmp_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
    blocks = np.arange(20_000, dtype="<u2").reshape(-1, 4)
    one, again, other = (np.concatenate(shuffled(tmp_path, blocks, seed)[1])[:, 0] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    # A local shuffle would leave place and origin correlated; 0.05 is 3.5 standard deviations for 5,000 blocks.
    assert abs(np.corrcoef(one, np.arange(len(one)))[0, 1]) < 0.05


def test_the_order_is_uniform(tmp_path, monkeypatch):
    """Each of four blocks, in two chunks and two buckets, comes to each place equally often."""
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4)
    blocks = np.arange(4, dtype="<u2").reshape(4, 1)
    places = np.zeros((4, 4), int)
    for seed in range(600):
        places[np.concatenate(shuffled(tmp_path, blocks, seed)[1])[:, 0], range(4)] += 1
    assert places.min() > 150 - 4 * 11 and places.max() < 150 + 4 * 11  # four standard deviations


def test_no_array_is_much_larger_than_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4000)
    sizes = [array.nbytes for array in shuffled(tmp_path, np.arange(50_000, dtype="<u2").reshape(-1, 5))[1]]
    assert len(sizes) == 25
    assert max(sizes) < 6000
