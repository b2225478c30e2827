"""Loader: from a prepared folder to the micro-batches of one rank.

The pipeline, stage by stage; every stage is a pure function of the one before it:

    manifest.json -> Manifest         what the folder holds, verified before anything is read (pretrain/manifest.py)
    position p    -> (epoch, place)   p counts samples since the start of the run: epoch = p // n, place = p % n
    place         -> sample index     a keyed pseudo-random permutation per (seed, epoch), computed, never stored
    sample index  -> (shard, offset)  cumulative shard sizes, then the index file beside the shard
    offset        -> tokens           a view of the memory-mapped shard, T + 1 tokens
                                      (a mixture first: position -> source and rank in it, pretrain/mixture.py)
    tokens        -> MicroBatch       rows gathered as int64, documents numbered by their end-of-text tokens
    MicroBatch    -> trainer          read ahead by threads, handed out in order

Nothing is iterated in order to reach a position, so starting at position 1,000,000 costs what starting at 0 costs.

Which rank reads what. The global batch at position p is the samples at positions p .. p + B - 1, whatever the number
of ranks. With W ranks and micro-batches of m, it is cut into A = B / (m W) accumulation steps; step a covers the
positions p + a m W .. p + (a + 1) m W - 1, of which rank r takes the r-th run of m.

Shapes: B global batch (samples), m micro-batch (samples), T tokens of a sequence, n samples of the split.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import tarfile
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_prep.manifest import verify
from data_prep.settings import UserError
from pretrain.manifest import Manifest, Mixture, Shard, index_path
from pretrain.mixture import Phase, Proportions, seed_of, starts_of, whole_weights

NEVER = 1 << 62  # a position that no run reaches
ROUNDS = 6  # of the Feistel network; four make a permutation, two more make small data sets well mixed too

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Result = TypeVar("Result")


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 well-mixed bits out."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(places: Indices, size: int, keys: Words) -> Indices:
    """A keyed permutation of range(size), evaluated at `places` [N] alone; returns [N].

    A generalised Feistel network with cycle walking (Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    CT-RSA 2002): the domain is a x b with a about b about sqrt(size), each round adds a hash of one half to the other,
    and what lands outside range(size) walks on until it is inside. keys [ROUNDS] are 64-bit words.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    moduli = (np.uint64(a), np.uint64(b))

    def rounds(words: Words) -> Words:
        halves = list(np.divmod(words, moduli[1]))
        for number, key in enumerate(keys):
            this, other = number % 2, 1 - number % 2
            hashed = _mix(halves[other] ^ key)
            halves[this] = (halves[this] + hashed % moduli[this]) % moduli[this]
        return halves[0] * moduli[1] + halves[1]

    result = rounds(places.astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = rounds(result[outside])
    return result.astype(np.int64)


def sample_order(positions: Indices, samples: int, seed: int) -> Indices:
    """Sample index at each global position [N] of a split of `samples`: a pure function of its arguments.

    Every epoch visits every sample once, in an order of its own.
    """
    epochs, places = np.divmod(positions, samples)
    order = np.empty_like(places)
    for epoch in np.unique(epochs):
        keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS, np.uint64).astype(np.uint64)
        order[epochs == epoch] = permute(places[epochs == epoch], samples, keys)
    return order


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(path: Path, dtype: torch.dtype) -> npt.NDArray[Any]:
    """The file at `path`, memory-mapped and read-only, as a flat array of `dtype`.

    Python's own `mmap`, and with it `numpy.memmap`, keeps a file descriptor open for each of thousands of shards;
    `torch.from_file` makes a private writable map, which the kernel counts as memory in use, and refuses under
    `vm.overcommit_memory=2` once the shards are larger than memory. A shared map that is only read is neither.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    pages: Any = (ctypes.c_char * size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size)
    mapped = np.frombuffer(pages, str(dtype).removeprefix("torch."), size // dtype.itemsize)
    mapped.flags.writeable = False
    return mapped


class Blocks:
    """Random access to the samples of one split: `blocks[i]` is a read-only view [T+1] of the mapped shard."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.shards = manifest.split(split).shards
        self.length = manifest.sequence_length + 1
        self.dtype: torch.dtype = getattr(torch, manifest.token_dtype)
        self._starts = list(itertools.accumulate((shard.samples for shard in self.shards), initial=0))
        self._opened: dict[int, tuple[npt.NDArray[Any], Indices]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        tokens, offsets = self._open(number)
        start = offsets[index - self._starts[number]] // self.dtype.itemsize
        return tokens[start : start + self.length]

    def gather(self, indices: Iterable[int]) -> torch.Tensor:
        """The samples `indices` as int64 [len(indices), T+1]. Raises UserError for a token outside the vocabulary."""
        indices = list(indices)
        rows = np.empty((len(indices), self.length), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            row[:] = self[index]
        wrong = np.flatnonzero(rows.max(axis=1) >= self.manifest.vocab_size)
        if wrong.size:  # an embedding looked up out of range would end the run without a name
            index = indices[wrong[0]]
            shard = self.shards[bisect_right(self._starts, index) - 1]
            raise UserError(
                f"{self.manifest.folder / shard.name}: shard is altered: sample {index} holds token "
                f"{rows[wrong[0]].max()}, vocabulary is {self.manifest.vocab_size}"
            )
        return torch.from_numpy(rows)

    def verify_index(self) -> None:
        """Walk every tar and compare the end of each member with the index; raises UserError naming the index."""
        size = self.length * self.dtype.itemsize
        for number, shard in enumerate(self.shards):
            path = self.manifest.folder / shard.name
            with tarfile.open(path) as tar:
                starts = [start for member in tar if member.isfile() for start in _starts(tar, member, size)]
            if not np.array_equal(self._open(number)[1], starts):
                raise UserError(f"{index_path(path)}: index does not match its shard; prepare the folder anew")

    def _open(self, number: int) -> tuple[npt.NDArray[Any], Indices]:
        """Tokens of shard `number`, and the byte in it at which each of its samples starts; both mapped."""
        if number not in self._opened:
            shard = self.shards[number]
            path = self.manifest.folder / shard.name
            offsets = _read_index(index_path(path), shard, self.length, self.dtype.itemsize)
            self._opened[number] = _map(path, self.dtype), offsets
        return self._opened[number]


def read_verified(folder: Path) -> Manifest:
    """`Manifest.read`, and every file compared with its sha256 and every tar with its index. Raises UserError."""
    manifest = Manifest.read(folder)
    verify(folder)
    for split in manifest.splits:
        Blocks(manifest, split).verify_index()
    return manifest


def _starts(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> Iterable[int]:
    """Bytes of a tar at which the samples of `size` bytes in one of its members start; the npy header comes before."""
    file = tar.extractfile(member)
    assert file is not None
    with file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        header = file.tell()
    return range(member.offset_data + header, member.offset_data + header + math.prod(shape) * dtype.itemsize, size)


# Python 3.11 raises a SystemError now and then where two threads parse at once, and numpy parses a file's header.
_PARSING = threading.Lock()


def _read_index(path: Path, shard: Shard, length: int, token_bytes: int) -> Indices:
    """The index at `path`, mapped; raises UserError unless it points at samples of `length` tokens in the shard."""
    sample_bytes = length * token_bytes
    try:
        with _PARSING:
            array = np.load(path, mmap_mode="r")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an index: {error}; prepare the folder anew") from None
    if (
        not isinstance(array, np.memmap)
        or (array.dtype, array.shape) != (np.int64, (shard.samples,))
        or array[0] < 0
        or array[-1] + sample_bytes > shard.bytes
        or (np.diff(array) < sample_bytes).any()
        or (array & (token_bytes - 1)).any()
    ):
        raise UserError(f"{path}: index is altered; prepare the folder anew")
    return _map(path, torch.int64)[array.offset // 8 :]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes: `model(input_ids, targets=targets, document_ids=document_ids)`.

    input_ids [m,T] int64: tokens 0 .. T-1 of each block.
    targets [m,T] int64: tokens 1 .. T, what each position predicts; -100 where nothing is predicted.
    document_ids [m,T] int64: end-of-text tokens strictly before each position, so that end-of-text belongs to the
        document that it ends; None where attention crosses documents.
    num_documents: of all rows together; None where attention crosses documents.
    samples: rows that count. Rows from `samples` on fill up a last validation batch, and all their targets are -100.
    fault: why these rows stand in for ones that could not be read.
    ready: when the copy to a GPU, on a stream of its own, is done.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None
    samples: int
    fault: Exception | None = None
    num_documents: int | None = None
    ready: torch.cuda.Event | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on `device`; of one that was sent there ahead, the stream at hand waits for it, and no host."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.input_ids.device)
            stream.wait_event(self.ready)
            for tensor in self._tensors():
                tensor.record_stream(stream)
            return self
        return self._with([tensor.to(device, non_blocking=True) for tensor in self._tensors()])

    def sent(self, device: torch.device, stream: torch.cuda.Stream) -> MicroBatch:
        """The same, on its way to a GPU from pinned memory, beside whatever else that does."""
        with torch.cuda.device(device), torch.cuda.stream(stream):
            there = self._with([tensor.pin_memory().to(device, non_blocking=True) for tensor in self._tensors()])
            return replace(there, ready=stream.record_event())

    def _tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.input_ids, self.targets, self.document_ids) if x is not None]

    def _with(self, tensors: list[torch.Tensor]) -> MicroBatch:
        inputs, targets, *documents = tensors
        return replace(self, input_ids=inputs, targets=targets, document_ids=documents[0] if documents else None)


def number_documents(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Document of each position [m,T]: how many end-of-text tokens stand strictly before it in its row."""
    ends = (input_ids == eos_token_id).long()
    return ends.cumsum(dim=1) - ends


def _micro_batch(rows: torch.Tensor, eos_token_id: int, document_masking: bool, samples: int) -> MicroBatch:
    input_ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    targets[samples:] = -100
    if not document_masking:
        return MicroBatch(input_ids, targets, None, samples)
    documents = number_documents(input_ids, eos_token_id)
    count = int(documents[:, -1].sum()) + len(documents)
    return MicroBatch(input_ids, targets, documents, samples, num_documents=count)


class ReadAhead(Iterator[Result]):
    """`map(load, arguments)` in order, with at most `depth` results computed ahead by `workers` threads.

    An exception of `load` is raised where its result would have come, and nothing comes after it. `close` ends the
    threads. One that is dropped instead waits for nothing: the collector of garbage may find it in any thread, also in
    one that holds the locks of `threading`, where a generator that joined its threads at its end hung for good.
    """

    def __init__(self, load: Callable[[int], Result], arguments: Iterable[int], depth: int, workers: int) -> None:
        self._load, self._remaining, self._depth = load, iter(arguments), depth
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._pending: deque[Future[Result]] = deque()
        self._closed = False

    def __next__(self) -> Result:
        if self._closed:
            raise StopIteration
        try:
            for argument in itertools.islice(self._remaining, self._depth + 1 - len(self._pending)):
                self._pending.append(self._executor.submit(self._load, argument))
            if self._pending:
                return self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the threads; what is being loaded is waited for."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that a rank runs per global batch; raises UserError where the sizes do not divide."""
    at_once = micro_batch_size * world_size
    if batch_size < 1 or at_once < 1 or batch_size % at_once:
        at_once = max(1, at_once)
        below, above = batch_size // at_once * at_once, -(-batch_size // at_once) * at_once
        works = " or ".join(str(x) for x in sorted({below, above, at_once}) if x >= at_once)
        raise UserError(
            f"batch.size {batch_size} does not divide into micro-batches of {micro_batch_size} sequences on "
            f"{world_size} ranks ({at_once} at a time); set batch.size to {works}"
        )
    return batch_size // at_once


class BlockLoader(Iterator[list[MicroBatch]]):
    """Endless iterator over the global batches of a split: of each, this rank's micro-batches, in order.

    `position` counts the samples that all ranks together have been handed since the start of the run; it is the whole
    state. A batch may span two epochs. Batch size and number of ranks may change from one run to the next; samples are
    neither skipped nor repeated.

    batch_size: samples of a global batch; micro_batch_size: samples of one forward on one rank.
    seed: of the order of samples. document_masking: give `document_ids`.
    read_ahead_batches: global batches held ready; workers: threads that gather them. Neither changes what is yielded.
    device: where they will be wanted; the threads send them to a GPU ahead.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        position: int = 0,
        document_masking: bool = True,
        read_ahead_batches: int = 4,
        workers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of world_size {world_size}")
        for name, value, least in (("seed", seed, 0), ("position", position, 0), ("workers", workers, 1)):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        self.manifest = manifest
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.accumulation_steps = accumulation_steps(batch_size, micro_batch_size, world_size)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.document_masking = document_masking
        self.position = position
        self.skipped: tuple[int, int] | None = None  # positions from .. to (without) that are left out
        sources = manifest.sources if isinstance(manifest, Mixture) else {"": manifest}
        self._blocks = {name: Blocks(source, split) for name, source in sources.items()}
        self._starts = [0] * len(manifest.shares) if isinstance(manifest, Mixture) else [0]
        self._set_starts([0] + [NEVER] * (len(self._starts) - 1))
        self._depth, self._workers = max(1, read_ahead_batches), workers
        self._batches: ReadAhead[list[MicroBatch]] | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @property
    def epoch(self) -> int:
        """Times that the whole split has been handed out; of a mixture, all samples of all its sources."""
        return self.position // len(self)

    @property
    def source_epochs(self) -> dict[str, float]:
        """How often each source of a mixture has been handed out; empty where there is none."""
        return self.epochs_at(self.position)

    def epochs_at(self, position: int) -> dict[str, float]:
        """How often each source of a mixture has been handed out before `position`."""
        if not isinstance(self.manifest, Mixture):
            return {}
        counts = self._order.counts(position)
        return {
            name: int(count) / len(blocks) for (name, blocks), count in zip(self._blocks.items(), counts, strict=True)
        }

    def spread_over(self, samples: int) -> None:
        """Say how many samples the whole run has, of which a mixture's weights may change at shares.

        What has been handed out stays as it was, also where the budget is another one than before.
        """
        if isinstance(self.manifest, Mixture):
            self.close()
            self._set_starts(starts_of(self.manifest.shares, samples, self.position, self._starts))

    def _set_starts(self, starts: list[int]) -> None:
        self._starts = starts
        weights = self.manifest.phases if isinstance(self.manifest, Mixture) else [[1.0]]
        phases = [Phase(start, whole_weights(part)) for start, part in zip(starts, weights, strict=True)]
        self._order = Proportions([phase for phase in phases if phase.start < NEVER])

    def __len__(self) -> int:
        """Samples of the split; of a mixture, of all its sources."""
        return sum(map(len, self._blocks.values()))

    def _past_skipped(self, position: int) -> int:
        """`position`, or the end of what is left out if it lies in there."""
        if self.skipped is not None and self.skipped[0] <= position < self.skipped[1]:
            return self.skipped[1]
        return position

    def _batch_starts(self) -> Iterator[int]:
        """Where the global batches from here on begin."""
        position = self.position
        while True:
            position = self._past_skipped(position)
            yield position
            position += self.batch_size

    def __next__(self) -> list[MicroBatch]:
        if self._batches is None:
            self._batches = ReadAhead(self.load, self._batch_starts(), self._depth, self._workers)
        try:
            batch = next(self._batches)
        except BaseException:  # nothing comes after it: the next call must raise too, not end the run
            self._batches = None
            raise
        self.position = self._past_skipped(self.position) + self.batch_size
        return batch

    def load(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch that starts at `position`."""
        size = self.micro_batch_size
        starts = position + (np.arange(self.accumulation_steps) * self.world_size + self.rank) * size
        positions = (starts[:, None] + np.arange(size)).ravel()
        rows = self._rows(positions)
        batch = [
            _micro_batch(rows[first : first + size], self.manifest.eos_token_id, self.document_masking, size)
            for first in range(0, len(rows), size)
        ]
        if self._device is None or self._stream is None:
            return batch
        return [micro.sent(self._device, self._stream) for micro in batch]

    def _rows(self, positions: Indices) -> torch.Tensor:
        """The samples at `positions` [N], as int64 [N, T+1]."""
        if len(self._blocks) == 1 and not isinstance(self.manifest, Mixture):
            (blocks,) = self._blocks.values()
            return blocks.gather(sample_order(positions, len(blocks), self.seed).tolist())
        sources, ranks = self._order.locate(positions)
        rows = torch.empty((len(positions), self.manifest.sequence_length + 1), dtype=torch.int64)
        for number, (name, blocks) in enumerate(self._blocks.items()):
            here = np.flatnonzero(sources == number)
            order = sample_order(ranks[here], len(blocks), seed_of(self.seed, name))
            if len(here):
                rows[torch.from_numpy(here)] = blocks.gather(order.tolist())
        return rows

    def stand_in(self) -> list[MicroBatch]:
        """Micro-batches shaped as real ones that predict nothing: what a rank whose data failed ends its step with."""
        shape = (self.micro_batch_size, self.manifest.sequence_length)
        ids = torch.full(shape, self.manifest.eos_token_id)
        documents = number_documents(ids, self.manifest.eos_token_id) if self.document_masking else None
        return [MicroBatch(ids, torch.full(shape, -100), documents, 0)] * self.accumulation_steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values, the same on every rank."""
        return {
            "position": self.position,
            "seed": self.seed,
            "skipped": self.skipped,
            "fingerprint": self.manifest.fingerprint,
            "tokenizer_fingerprint": self.manifest.tokenizer_fingerprint,
            "starts": self._starts,
            "sources": {name: blocks.manifest.fingerprint for name, blocks in self._blocks.items() if name},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if the tokenizer, the data set or the seed is another one."""
        self.manifest.check_tokenizer(state["tokenizer_fingerprint"], "the checkpoint")
        if state["fingerprint"] != self.manifest.fingerprint:
            raise UserError(
                f"{self.manifest.folder}: not the data that the checkpoint was trained on: fingerprint "
                f"{self.manifest.fingerprint}, checkpoint {state['fingerprint']}; restore that data or start a new run"
            )
        if state["seed"] != self.seed:
            raise UserError(f"seed {self.seed} orders the data differently from the checkpoint's seed {state['seed']}")
        self.close()
        self.position = state["position"]
        self.skipped = tuple(skipped) if (skipped := state.get("skipped")) else None
        self._set_starts(state.get("starts", [0]))

    def close(self) -> None:
        """End the threads. The loader may be used again; it goes on at `position`."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def fixed_batches(
    manifest: Manifest,
    split: str,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    samples: int | None = None,
    document_masking: bool = True,
) -> Iterator[MicroBatch]:
    """The first `samples` (None: all) of a split once, in stored order: this rank's micro-batches, for validation.

    Every sample comes exactly once over all ranks. Every rank gets the same number of micro-batches of the same shape,
    so that collectives inside the model stay in step: the last ones are filled up with rows that predict nothing. Of
    several ranks, one that cannot read yields such rows too, with what it met as their `fault`.
    """
    blocks = Blocks(manifest, split)
    total = len(blocks) if samples is None else min(samples, len(blocks))
    at_once = micro_batch_size * world_size

    def load(start: int) -> MicroBatch:
        first = start + rank * micro_batch_size
        real = min(max(total - first, 0), micro_batch_size)
        indices = [index if index < total else 0 for index in range(first, first + micro_batch_size)]
        try:
            return _micro_batch(blocks.gather(indices), manifest.eos_token_id, document_masking, real)
        except Exception as error:
            if world_size == 1:
                raise
            ids = torch.full((micro_batch_size, manifest.sequence_length), manifest.eos_token_id)
            documents = number_documents(ids, manifest.eos_token_id) if document_masking else None
            return MicroBatch(ids, torch.full_like(ids, -100), documents, 0, error)

    return ReadAhead(load, range(0, total, at_once), depth=2, workers=1)


BIGRAM_VOCABULARY, BIGRAM_TOKENS = 4096, 50_000_000  # beyond which counting pairs would hold up a run's start


def bigram_loss(manifest: Manifest) -> float | None:
    """Mean -log p over validation targets, in nats per token, of the best smoothed bigram model of the training split.

    p(b | a) = (count(ab) + k p(b)) / (count(a) + k), p(b) as for `unigram_loss`, k the best of some powers of 4 on
    these very targets: a line that a model has to stay below cannot be too strong. None for a mixture, a vocabulary
    above `BIGRAM_VOCABULARY` and more than `BIGRAM_TOKENS` to count.
    """
    size = manifest.vocab_size
    if isinstance(manifest, Mixture) or size > BIGRAM_VOCABULARY or manifest.split("train").tokens > BIGRAM_TOKENS:
        return None
    pairs = np.zeros(size * size, np.int64)
    for first, second in _pairs(manifest, "train"):
        pairs += np.bincount(first * size + second, minlength=size * size)
    counts = pairs.reshape(size, size).astype(np.float64)
    unigram = counts.sum(0) + 1.0
    unigram /= unigram.sum()
    before = counts.sum(1)
    losses, total = np.zeros(8), 0
    for first, second in _pairs(manifest, "validation"):
        for power in range(len(losses)):
            k = 4.0**power / 4
            losses[power] -= np.log((counts[first, second] + k * unigram[second]) / (before[first] + k)).sum()
        total += len(first)
    return float(losses.min() / total)


def _pairs(manifest: Manifest, split: str) -> Iterator[tuple[Indices, Indices]]:
    """Every (token, target) of a split, some thousand sequences at a time."""
    blocks = Blocks(manifest, split)
    for start in range(0, len(blocks), 4096):
        rows = np.asarray(blocks.gather(list(range(start, min(start + 4096, len(blocks))))), dtype=np.int64)
        yield rows[:, :-1].ravel(), rows[:, 1:].ravel()
