"""The global shuffle: every whole block once, the order a function of the seed, memory bounded by the bucket."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shuffle import shuffled_blocks


def shuffled(folder, tokens, width, seed=0, bucket_bytes=1 << 20):
    return list(shuffled_blocks(tokens, width, seed, folder, bucket_bytes))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(1, 7), st.integers(0, 2**63 - 1), st.integers(1, 500))
def test_every_whole_block_comes_once_whatever_the_buckets(tmp_path_factory, count, width, seed, bucket_bytes):
    folder = tmp_path_factory.mktemp("buckets")
    tokens = np.arange(count, dtype="<u2")
    blocks = np.concatenate([np.zeros((0, width), "<u2"), *shuffled(folder, tokens, width, seed, bucket_bytes)])
    order = np.argsort(blocks[:, 0])
    assert np.array_equal(blocks[order].ravel(), tokens[: count // width * width])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 2000])
def test_the_order_depends_on_the_seed_and_mixes_the_whole_corpus(tmp_path, bucket_bytes):
    tokens = np.arange(20_000, dtype="<u2")
    one, again, other = (np.concatenate(shuffled(tmp_path, tokens, 4, seed, bucket_bytes))[:, 0] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    # A local shuffle would leave place and origin correlated; 0.05 is 3.5 standard deviations for 5,000 blocks.
    assert abs(np.corrcoef(one, np.arange(len(one)))[0, 1]) < 0.05


def test_no_array_is_much_larger_than_a_bucket(tmp_path):
    tokens = np.arange(50_000, dtype="<u2")
    sizes = [array.nbytes for array in shuffled(tmp_path, tokens, 5, bucket_bytes=4000)]
    assert len(sizes) == 25
    assert max(sizes) < 6000
