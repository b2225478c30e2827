"""Blocks of tokens -> webdataset tars of bounded size, each with an index beside it.

A tar member is `{global_index:012d}.tokens.npy`: the tar header (512 bytes), the npy header, the tokens, zeros up to
a multiple of 512. All members of a split have one size, so a block's place is also plain arithmetic; the index
`shard-000000.idx.npy` states it: int64 byte offset, in the tar, of the first token of each sample.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.files import atomic
from data_prep.settings import UserError

_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Shard:
    """One tar, as the manifest records it. name: relative to the prepared folder; bytes and sha256: of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


def npy_header(width: int, dtype: np.dtype) -> bytes:
    """Header of an npy file that holds `width` tokens."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": (width,)})
    return buffer.getvalue()


def member_header(index: int, size: int) -> bytes:
    """Tar header of sample `index`: no time, no owner, so that equal content gives equal bytes."""
    info = tarfile.TarInfo(f"{index:012d}.tokens.npy")
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def samples_per_shard(width: int, dtype: np.dtype, shard_bytes: int) -> int:
    """How many blocks fit into a tar of `shard_bytes`. Raises UserError when none does."""
    member = _member_bytes(width, dtype)
    if shard_bytes < member + len(_END):
        raise UserError(
            f"shard_bytes={shard_bytes} is too small for one sample of sequence_length={width - 1}; "
            f"set it to {member + len(_END)} or more"
        )
    return (shard_bytes - len(_END)) // member


def _member_bytes(width: int, dtype: np.dtype) -> int:
    payload = len(npy_header(width, dtype)) + width * dtype.itemsize
    return tarfile.BLOCKSIZE + -(-payload // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def token_offsets(samples: int, width: int, dtype: np.dtype) -> np.ndarray:
    """The index of a tar: [samples] int64, byte offset of the first token of each sample."""
    first = tarfile.BLOCKSIZE + len(npy_header(width, dtype))
    return first + _member_bytes(width, dtype) * np.arange(samples, dtype=np.int64)


def write_shards(blocks: Iterable[np.ndarray], folder: Path, split: str, shard_bytes: int) -> Iterator[Shard]:
    """Write arrays [blocks, W] in their order to `folder`/`split`; yield each shard once it is whole on disk."""
    number = first = capacity = 0
    held = np.zeros((0, 0))
    for array in blocks:
        if capacity == 0:
            capacity = samples_per_shard(array.shape[1], array.dtype, shard_bytes)
        held = np.concatenate([held, array]) if len(held) else array
        while len(held) >= capacity:
            yield _write_shard(held[:capacity], folder, f"{split}/shard-{number:06d}", first)
            held = held[capacity:]
            number, first = number + 1, first + capacity
    if len(held):
        yield _write_shard(held, folder, f"{split}/shard-{number:06d}", first)


def _write_shard(blocks: np.ndarray, folder: Path, name: str, first: int) -> Shard:
    """Write one tar and its index. first: global index of its first sample."""
    header = npy_header(blocks.shape[1], blocks.dtype)
    payload = len(header) + blocks[0].nbytes
    padding = bytes(-payload % tarfile.BLOCKSIZE)
    digest, size = hashlib.sha256(), 0
    with atomic(folder / f"{name}.tar") as file:
        for number, block in enumerate(blocks):
            piece = member_header(first + number, payload) + header + block.tobytes() + padding
            digest.update(piece)
            size += file.write(piece)
        digest.update(_END)
        size += file.write(_END)
    with atomic(folder / f"{name}.idx.npy") as file:
        np.save(file, token_offsets(len(blocks), blocks.shape[1], blocks.dtype))
    return Shard(f"{name}.tar", len(blocks), size, digest.hexdigest())


def write_split(blocks: Iterable[np.ndarray], folder: Path, split: str, shard_bytes: int, vocab_size: int) -> dict:
    """Write a split's shards. Returns samples, tokens (stored), shards, and counts: how often each id is a target."""
    counts = np.zeros(vocab_size, np.int64)
    width = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal counts, width
        for array in blocks:
            width = array.shape[1]
            for start in range(0, len(array), 4096):  # bincount works on a copy in int64
                counts += np.bincount(array[start : start + 4096, 1:].ravel(), minlength=vocab_size)
            yield array

    shards = [asdict(shard) for shard in write_shards(counted(), folder, split, shard_bytes)]
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "tokens": samples * width, "shards": shards, "counts": counts.tolist()}
