"""Key-value caches for generation: a token holds keys and values only for the stages that it entered.

Shapes: B batch, T positions at hand, S positions of a row so far (padding included), K query slots of a row, N tokens
that passed a gate, packed over the batch, C the most tokens of a row that passed it, H query heads,
Hkv key/value heads, Dh head dimension.

`MoRCache` is a transformers `Cache`. Layers that see every token are transformers' own `DynamicLayer` [B, Hkv, S, Dh];
layers that hold the tokens that passed a gate alone are `RaggedLayer` [N, Hkv, Dh], whose bookkeeping one `RaggedIndex`
per gate holds. Uses of layers with a `source` read that use's keys; where they compute some of their own, these replace
the source's at the positions of the tokens that entered (paper section 2.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .config import MoRConfig
from .depth import stages_of
from .depth.layout import Use
from .layers import Tokens, attend


def owned_uses(config: MoRConfig) -> list[Use]:
    """The uses of layers that hold keys and values of their own."""
    return [use for stage in stages_of(config) for use in stage.uses if use.keys != "none"]


def kv_bytes_per_token(config: MoRConfig, bytes_per_value: int) -> int:
    """Bytes of the keys and values of one token in one layer."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_value


def kv_bytes(config: MoRConfig, entered: list[int], everyone: int, bytes_per_value: int) -> int:
    """Bytes of keys and values. entered: tokens held per gate [G]; everyone: tokens held by the other layers."""
    tokens = 0
    for stage in stages_of(config):
        for use in stage.uses:
            ragged = use.keys == "entered" and stage.gate is not None
            tokens += 0 if use.keys == "none" else entered[stage.gate or 0] if ragged else everyone
    return tokens * kv_bytes_per_token(config, bytes_per_value)


class RaggedIndex:
    """Which tokens the stage of a gate holds: `rows` and `places` [N] in order of arrival.

    `table` [B, C] lists each row's tokens; `valid` [B, C] is False where a row holds fewer than C. Places count from 0
    over a row, padding included.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.rows = self.places = torch.zeros(0, dtype=torch.long)
        self.table = self.valid = torch.zeros(0, 0, dtype=torch.long)

    def append(self, rows: Tensor, places: Tensor, batch: int) -> None:
        """Take in tokens, ascending by place within a row. rows, places: [N]."""
        self.rows, self.places = torch.cat([self.rows.to(rows), rows]), torch.cat([self.places.to(places), places])
        self._tabulate(batch)

    def keep(self, chosen: Tensor, rows: Tensor, batch: int) -> None:
        """Hold the tokens `chosen` [M] alone, as tokens of `rows` [M]."""
        self.rows, self.places = rows, self.places[chosen]
        self._tabulate(batch)

    def _tabulate(self, batch: int) -> None:
        order = torch.sort(self.rows, stable=True).indices
        counts = torch.bincount(self.rows, minlength=batch)
        width = int(counts.max()) if batch else 0
        slots = torch.arange(width, device=order.device)
        self.valid = slots < counts[:, None]
        starts = counts.cumsum(0) - counts
        last = max(len(order) - 1, 0)
        self.table = order[(starts[:, None] + slots).clamp(max=last)] if width else order.new_zeros(batch, 0)

    def mask(self, places: Tensor) -> Tensor:
        """Who may look at whom. places: [B, K] places of the queries -> [B, 1, K, C]."""
        keys = self.places[self.table]
        return ((keys[:, None] <= places[..., None]) & self.valid[:, None])[:, None]


class RaggedLayer(CacheLayerMixin):
    """Keys and values [N, Hkv, Dh] of the tokens that passed one gate, in one layer."""

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, index: RaggedIndex):
        super().__init__()
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:0], value_states[:0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [N, Hkv, Dh] in the order of the index; returns everything held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = torch.cat([self.keys, key_states]), torch.cat([self.values, value_states])
        return self.keys, self.values

    def padded(self) -> tuple[Tensor, Tensor]:
        """Everything held as [B, Hkv, C, Dh]; what the index marks invalid repeats some token."""
        table = self.index.table
        if table.shape[0] == 1:
            return self.keys.transpose(0, 1)[None], self.values.transpose(0, 1)[None]
        return self.keys[table].transpose(1, 2), self.values[table].transpose(1, 2)

    def keep(self, chosen: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[chosen], self.values[chosen]

    def get_seq_length(self) -> int:
        return self.index.table.shape[1]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False


class MoRCache(Cache):
    """Cache of every architecture and KV strategy, for causal routing.

    Rows may be padded on either side: padding takes no place in ragged layers, and is masked elsewhere.
    """

    layers: list[Any]

    def __init__(self, config: MoRConfig):
        self.config = config
        stages = stages_of(config)
        self.indices = {s.gate: RaggedIndex() for s in stages if s.gate is not None and s.uses[0].keys == "entered"}
        # What queries of a gate's stage look at: its own tokens alone, or every token.
        self._sees_all = {stage.gate: stage.sees_all for stage in stages}
        layers: list[Any] = []
        own: dict[int, int] = {}
        for stage in stages:
            for use in stage.uses:
                if use.keys == "none":
                    continue
                own[use.depth] = len(layers)
                index = self.indices.get(-1 if stage.gate is None else stage.gate)
                layers.append(DynamicLayer() if index is None else RaggedLayer(index))
        super().__init__(layers=layers)
        # depth -> the layer that it writes (or None), the layer that it reads beside or instead of it (or None)
        self._plan = {
            use.depth: (own.get(use.depth), None if use.source is None else own[use.source])
            for stage in stages
            for use in stage.uses
        }
        self.batch = 0
        self.seen = 0

    # What the model calls --------------------------------------------------------------------------------------------

    def begin(self, batch: int) -> int:
        """Check a forward pass's batch size; returns how many positions of each row came before."""
        if self.seen and batch != self.batch:
            raise ValueError(f"past_key_values: holds a batch of {self.batch}, the input has {batch} rows")
        self.batch = batch
        return self.seen

    def advance(self, length: int) -> None:
        """Count the positions of a finished forward pass."""
        self.seen += length

    def enter(self, gate: int, flat: Tensor, tokens: Tokens, length: int) -> Tensor | None:
        """Note which tokens pass a gate; returns its queries' mask [B, 1, K, C], None if they see every token.

        flat: [N] ascending b * T + t of the tokens at hand; length: T.
        """
        assert tokens.index is not None
        if gate in self.indices:
            self.indices[gate].append(flat // length, flat % length + self.seen, self.batch)
        return None if self._sees_all[gate] else self.indices[gate].mask(tokens.index + self.seen)

    def writes(self, depth: int) -> bool:
        """Whether keys and values are stored at this depth."""
        return self._plan[depth][0] is not None

    def attend(self, query: Tensor, key: Tensor | None, value: Tensor | None, tokens: Tokens, depth: int) -> Tensor:
        """Store this depth's keys and values and attend to all that came before.

        query: [B, K, H, Dh] or [N, H, Dh]; key, value: as query with Hkv heads, None where nothing is stored.
        Returns the shape of `query`.
        """
        own, first = self._plan[depth]
        if own is not None:
            assert key is not None and value is not None
            if isinstance(self.layers[own], DynamicLayer):
                key, value = key.transpose(1, 2), value.transpose(1, 2)
            key, value = self.update(key, value, own)
            if isinstance(self.layers[own], RaggedLayer):
                key, value = self.layers[own].padded() if first is None else self._replaced(own, first)
        else:
            assert first is not None
            key, value = self.layers[first].keys, self.layers[first].values
        query = tokens.to_slots(query).transpose(1, 2)
        return tokens.from_slots(attend(query, key, value, tokens.seen, self.config, False).transpose(1, 2))

    def _replaced(self, own: int, first: int) -> tuple[Tensor, Tensor]:
        """The source's keys and values, replaced where a token entered this stage. [B, Hkv, S, Dh]."""
        index, deeper, shared = self.layers[own].index, self.layers[own], self.layers[first]
        key, value = shared.keys.clone(), shared.values.clone()
        key[index.rows, :, index.places] = deeper.keys
        value[index.rows, :, index.places] = deeper.values
        return key, value

    # What transformers calls -----------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions of each row that were seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def batch_size(self) -> int:
        return self.batch or -1

    def memory_bytes(self) -> int:
        """Bytes of the keys and values held."""
        held = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in held)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold the rows `indices` [B'] in this order; a row may appear more than once."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.batch_select_indices(indices)
        for r, index in self.indices.items():
            if not len(index.rows):
                continue
            picked = indices.to(index.table.device)
            valid = index.valid[picked]
            rows = torch.arange(len(picked), device=valid.device)[:, None].expand_as(valid)[valid]
            chosen = index.table[picked][valid]
            index.keep(chosen, rows, len(picked))
            self._keep(r, chosen)
        self.batch = len(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions of every row. tokens_to_remove: their number, negative as transformers has it."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)
        for r, index in self.indices.items():
            chosen = (index.places < self.seen).nonzero().squeeze(1)
            index.keep(chosen, index.rows[chosen], self.batch)
            self._keep(r, chosen)

    def crop_layer(self, depth: int, count: int) -> None:
        """Forget the last `count` positions at one depth alone, whose keys are of every token."""
        own = self._plan[depth][0]
        assert own is not None
        self.layers[own].crop(-count)

    def _keep(self, gate: int, chosen: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, RaggedLayer) and layer.index is self.indices[gate]:
                layer.keep(chosen)

    def reset(self) -> None:
        # New layers: transformers 5.17 fills what they hold with zeros, and grows it from there.
        self.layers = [DynamicLayer() if isinstance(layer, DynamicLayer) else layer for layer in self.layers]
        super().reset()
        for r in self.indices:
            self.indices[r].clear()
        self.batch = self.seen = 0
