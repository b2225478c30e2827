"""Blocks of tokens -> webdataset tars of bounded size, each with an index beside it.

A tar member is `{index of its first sample:012d}.tokens.npy`: the tar header (512 bytes), the npy header, the tokens of
n samples as an array [n, W], zeros up to a multiple of 512. n is the smallest number at which all but the tokens is
below OVERHEAD of them, so that short sequences do not fill a disk with headers; a tar's last member may hold fewer.
A sample's place is plain arithmetic; the index `shard-000000.idx.npy` states it: int64 byte offset, in the tar, of the
first token of each sample.
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

OVERHEAD = 0.05
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Shard:
    """One tar, as the manifest records it. name: relative to the prepared folder; bytes and sha256: of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


def npy_header(samples: int, width: int, dtype: np.dtype) -> bytes:
    """Header of an npy file that holds `samples` blocks of `width` tokens."""
    buffer = io.BytesIO()
    shape = (samples, width)
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def member_header(index: int, size: int) -> bytes:
    """Tar header of the member that starts with sample `index`: no time, no owner, so that equal content gives equal
    bytes."""
    info = tarfile.TarInfo(f"{index:012d}.tokens.npy")
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def samples_per_member(width: int, dtype: np.dtype) -> int:
    """How many blocks a full member holds."""
    tokens = width * dtype.itemsize
    count = 1
    while _member_bytes(count, width, dtype) > (1 + OVERHEAD) * count * tokens:
        count += 1
    return count


def samples_per_shard(width: int, dtype: np.dtype, shard_bytes: int) -> int:
    """How many blocks fit into a tar of `shard_bytes`. Raises UserError when none does."""
    least = _member_bytes(1, width, dtype) + len(_END)
    if shard_bytes < least:
        raise UserError(
            f"shard_bytes={shard_bytes} is too small for one sample of sequence_length={width - 1}; "
            f"set it to {least} or more"
        )
    full = samples_per_member(width, dtype)
    members, rest = divmod(shard_bytes - len(_END), _member_bytes(full, width, dtype))
    headers = tarfile.BLOCKSIZE + len(npy_header(full, width, dtype))
    more = (rest // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE - headers) // (width * dtype.itemsize)
    return members * full + max(0, more)


def _member_bytes(samples: int, width: int, dtype: np.dtype) -> int:
    payload = len(npy_header(samples, width, dtype)) + samples * width * dtype.itemsize
    return tarfile.BLOCKSIZE + -(-payload // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def token_offsets(samples: int, width: int, dtype: np.dtype, per_member: int | None) -> np.ndarray:
    """The index of a tar: [samples] int64, byte offset of the first token of each sample.

    per_member: samples of a full member; None: one in each, an array [W], as tars were written at first.
    """
    if per_member is None:
        return tarfile.BLOCKSIZE + 128 + _member_bytes(1, width, dtype) * np.arange(samples, dtype=np.int64)
    members, inside = np.divmod(np.arange(samples, dtype=np.int64), per_member)
    first = tarfile.BLOCKSIZE + len(npy_header(per_member, width, dtype))
    return first + _member_bytes(per_member, width, dtype) * members + width * dtype.itemsize * inside


def write_shards(
    blocks: Iterable[np.ndarray], folder: Path, split: str, shard_bytes: int, number: int = 0
) -> Iterator[Shard]:
    """Write arrays [blocks, W] in their order to `folder`/`split`; yield each shard once it is whole on disk.

    number: of the first shard; those before it are full.
    """
    first = capacity = 0
    held = np.zeros((0, 0))
    for array in blocks:
        if capacity == 0:
            capacity = samples_per_shard(array.shape[1], array.dtype, shard_bytes)
            first = number * capacity
        held = np.concatenate([held, array]) if len(held) else array
        while len(held) >= capacity:
            yield _write_shard(held[:capacity], folder, f"{split}/shard-{number:06d}", first)
            held = held[capacity:]
            number, first = number + 1, first + capacity
    if len(held):
        yield _write_shard(held, folder, f"{split}/shard-{number:06d}", first)


def _write_shard(blocks: np.ndarray, folder: Path, name: str, first: int) -> Shard:
    """Write one tar and its index. first: global index of its first sample."""
    width, dtype = blocks.shape[1], blocks.dtype
    per_member = samples_per_member(width, dtype)
    digest, size = hashlib.sha256(), 0
    with atomic(folder / f"{name}.tar") as file:
        for start in range(0, len(blocks), per_member):
            member = blocks[start : start + per_member]
            content = npy_header(len(member), width, dtype) + member.tobytes()
            padding = bytes(-len(content) % tarfile.BLOCKSIZE)
            piece = member_header(first + start, len(content)) + content + padding
            digest.update(piece)
            size += file.write(piece)
        digest.update(_END)
        size += file.write(_END)
    with atomic(folder / f"{name}.idx.npy") as file:
        np.save(file, token_offsets(len(blocks), width, dtype, per_member))
    return Shard(f"{name}.tar", len(blocks), size, digest.hexdigest())


def write_split(
    blocks: Iterable[np.ndarray], folder: Path, split: str, shard_bytes: int, vocab_size: int, number: int = 0
) -> dict:
    """Write a split's shards from `number` on. Returns samples, tokens (stored), shards, and counts: how often each id
    is a target."""
    counts = np.zeros(vocab_size, np.int64)
    width = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal counts, width
        for array in blocks:
            width = array.shape[1]
            for start in range(0, len(array), 4096):  # bincount works on a copy in int64
                counts += np.bincount(array[start : start + 4096, 1:].ravel(), minlength=vocab_size)
            yield array

    shards = [asdict(shard) for shard in write_shards(counted(), folder, split, shard_bytes, number)]
    samples = sum(shard["samples"] for shard in shards)
    return {"samples": samples, "tokens": samples * width, "shards": shards, "counts": counts.tolist()}
