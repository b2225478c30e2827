"""The sharing maps: pure functions of depth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MoRConfig
from model.sharing import applications, layer_index, num_unique_layers, recursion_index, segments

MAPS = {
    "cycle": [0, 1, 2, 0, 1, 2],
    "sequence": [0, 0, 1, 1, 2, 2],
    "middle_cycle": [0, 1, 2, 1, 2, 3],
    "middle_sequence": [0, 1, 1, 2, 2, 3],
}


@pytest.mark.parametrize(("sharing", "expected"), MAPS.items())
def test_maps_as_in_the_paper(sharing, expected):
    assert [layer_index(depth, 6, 2, sharing) for depth in range(6)] == expected


def test_vanilla_shares_nothing():
    config = MoRConfig(num_hidden_layers=5)
    assert num_unique_layers(config) == 5
    assert [(use.layer, use.recursion, use.encoding) for use in applications(config)] == [
        (i, None, None) for i in range(5)
    ]


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="sharing: unknown strategy 'spiral'"):
        layer_index(1, 6, 2, "spiral")


@settings(deadline=None, max_examples=60)
@given(
    sharing=st.sampled_from(sorted(MAPS)),
    recursions=st.integers(2, 5),
    block=st.integers(1, 6),
)
def test_every_shared_layer_runs_once_per_recursion(sharing, recursions, block):
    ends = 2 if sharing.startswith("middle_") else 0
    depth = recursions * block + ends
    config = MoRConfig(num_hidden_layers=depth, num_recursions=recursions, sharing=sharing)
    uses = applications(config)
    assert [use.depth for use in uses] == list(range(depth))
    assert {use.layer for use in uses} == set(range(num_unique_layers(config)))
    shared = [use for use in uses if use.recursion is not None]
    assert len(shared) == depth - ends
    for layer in {use.layer for use in shared}:
        assert sorted(use.recursion for use in shared if use.layer == layer) == list(range(recursions))
    assert [use for segment in segments(config) for use in segment] == uses
    encodings = [use.encoding for use in uses if use.encoding is not None]
    assert encodings == list(range(recursions if sharing.endswith("cycle") else recursions * block))
    assert all(recursion_index(use.depth, depth, recursions, sharing) == use.recursion for use in uses)
