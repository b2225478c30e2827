"""Sharing: pure maps from the effective depth of a layer to the unique layer whose weights it uses (Table 1).

L is the effective depth (`num_hidden_layers`), Nr the number of recursions (`num_recursions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MoRConfig


@dataclass(frozen=True)
class Application:
    """One use of a unique layer.

    depth: position among the L effective layers.
    layer: index of the unique layer.
    recursion: 0-based recursion that the use belongs to; None for unshared layers.
    encoding: index of the recursion encoding that scales the output of this use; None: none does.
    """

    depth: int
    layer: int
    recursion: int | None
    encoding: int | None


def layer_index(depth: int, L: int, Nr: int, sharing: str) -> int:
    """Unique layer that effective layer `depth` (0 .. L-1) uses."""
    if Nr == 1:
        return depth
    if sharing == "cycle":
        return depth % (L // Nr)
    if sharing == "sequence":
        return depth // Nr
    if depth == 0:
        return 0
    if depth == L - 1:
        return (L - 2) // Nr + 1
    if sharing == "middle_cycle":
        return 1 + (depth - 1) % ((L - 2) // Nr)
    if sharing == "middle_sequence":
        return 1 + (depth - 1) // Nr
    raise ValueError(f"sharing: unknown strategy {sharing!r}")


def recursion_index(depth: int, L: int, Nr: int, sharing: str) -> int | None:
    """0-based recursion of effective layer `depth`; None where the layer is not shared."""
    middle = sharing.startswith("middle_")
    if Nr == 1 or (middle and depth in (0, L - 1)):
        return None
    shared_depth, shared = (depth - 1, L - 2) if middle else (depth, L)
    return shared_depth // (shared // Nr) if sharing.endswith("cycle") else shared_depth % Nr


def num_unique_layers(config: MoRConfig) -> int:
    """Number of layers that own weights."""
    L, Nr = config.num_hidden_layers, config.num_recursions
    if Nr == 1:
        return L
    return (L - 2) // Nr + 2 if config.sharing.startswith("middle_") else L // Nr


def applications(config: MoRConfig) -> list[Application]:
    """Every use of every layer, in the order in which a token of full depth passes them.

    A recursion encoding belongs to the last layer of each recursion; under the sequence maps, where every layer repeats
    at once, to each shared layer.
    """
    L, Nr, sharing = config.num_hidden_layers, config.num_recursions, config.sharing
    result: list[Application] = []
    encodings = 0
    for depth in range(L):
        recursion = recursion_index(depth, L, Nr, sharing)
        encoding = None
        if recursion is not None:
            following = recursion_index(depth + 1, L, Nr, sharing) if depth + 1 < L else None
            if sharing.endswith("sequence") or following != recursion:
                encoding, encodings = encodings, encodings + 1
        result.append(Application(depth, layer_index(depth, L, Nr, sharing), recursion, encoding))
    return result


def segments(config: MoRConfig) -> list[list[Application]]:
    """`applications`, cut where one recursion ends and the next begins; an unshared layer stands alone.

    Under the sequence maps a recursion is not one stretch of depth, so the repeats of one layer form a segment.
    """
    cut: list[list[Application]] = []
    by_layer = config.sharing.endswith("sequence")
    previous = None
    for use in applications(config):
        key = None if use.recursion is None else (use.layer if by_layer else use.recursion)
        if key is None or key != previous:
            cut.append([])
        cut[-1].append(use)
        previous = key
    return cut
