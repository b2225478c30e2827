"""The pool: runs stay whole and apart, whatever is reserved, released, moved and compacted."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.inference.paged import PagedPool
from model.inference.pool import PagePool, Run
from tests.helpers.tiny import tiny_config


def written(pool: PagePool, run: Run) -> list[float]:
    first = run.first * pool.page_size
    return pool.layer_values[0][0, 0, first : first + run.length, 0].tolist()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(moves=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), max_size=40))
def test_runs_keep_their_contents_and_never_overlap(moves):
    pool = PagePool(tiny_config("vanilla"), 2, 13, 3, torch.float64, "cpu")
    runs, contents = [Run() for _ in range(6)], [[] for _ in range(6)]
    for step, (which, tokens, release) in enumerate(moves):
        run = runs[which]
        if release:
            pool.release(run)
            contents[which] = []
            continue
        free, needed = pool.free_pages(), -(-(run.length + tokens) // 3) - run.pages
        fits = pool.reserve(run, tokens)
        assert fits == (needed <= free)  # scattered pages are as good as contiguous ones
        if fits:
            values = [100.0 * step + i for i in range(tokens)]
            begin = run.first * 3 + run.length
            pool.layer_values[0][0, :, begin : begin + tokens] = torch.tensor(values).double()[:, None]
            run.length += tokens
            contents[which] = contents[which] + values
        assert [written(pool, run) for run in runs] == contents
        taken = [page for run in runs for page in range(run.first, run.first + run.pages)]
        assert len(set(taken)) == len(taken) == 13 - pool.free_pages()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(moves=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), max_size=40))
def test_pages_that_lie_anywhere_are_handed_out_once_and_come_back(moves):
    pool, runs = (
        PagedPool(tiny_config("vanilla"), 1, 13, 3, torch.float64, torch.device("cpu")),
        [Run() for _ in "abcdef"],
    )
    for which, tokens, release in moves:
        run = runs[which]
        if release:
            pool.release(run)
            continue
        free, needed = pool.free_pages(), -(-(run.length + tokens) // 3) - run.pages
        before = pool.slots(run, np.arange(run.length)).tolist()
        assert pool.reserve(run, tokens) == (needed <= free)
        if needed <= free:
            run.length += tokens
        assert pool.slots(run, np.arange(run.length)).tolist()[: len(before)] == before  # nothing moves
        taken = [slot for run in runs for slot in pool.slots(run, np.arange(run.length)).tolist()]
        assert len(set(taken)) == len(taken) and pool.scratch not in taken
        assert sum(run.pages for run in runs) == 13 - pool.free_pages()


def test_a_run_grows_in_place_while_its_neighbour_is_far():
    pool = PagePool(tiny_config("vanilla"), 1, 64, 4, torch.float32, "cpu")
    runs = [Run(), Run()]
    for _ in range(40):
        for run in runs:
            assert pool.reserve(run, 1)
            run.length += 1
    assert pool.moves <= 4
