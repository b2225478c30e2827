"""A text file as a stream of UTF-8 bytes: decompressed, past a byte order mark, UTF-16 and UTF-32 recognised."""

from __future__ import annotations

import codecs
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

_MARKS = (  # a UTF-32 mark begins with the UTF-16 one, so it is tried first
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SAMPLE = 4096
_PIECE = 1 << 16
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def _count_bytes(error: UnicodeError) -> tuple[str, int]:
    """Undecodable bytes of UTF-16 or UTF-32 as so many bytes that are not UTF-8, which `decode` counts."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff" * (error.end - error.start), error.end


codecs.register_error("data_prep.count", _count_bytes)


class _Pieces(io.RawIOBase):
    """A readable stream over bytes that come in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._held = memoryview(piece)
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Content of all frames, windows of 2 GiB included (`zstd --long=31`), which Arrow refuses.

    Raises OSError for a truncated file, which the library's own reader takes for a short one.
    """
    import zstandard

    frame: Any = None
    data = b""
    while data := data or raw.read(_PIECE):
        if frame is None:
            frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            yield frame.decompress(data)
        except zstandard.ZstdError as error:
            raise OSError(f"ZSTD decompress failed: {error}") from None
        data = b""
        if frame.eof:
            frame, data = None, frame.unused_data
    if frame is not None:
        raise OSError("Truncated compressed stream")


def _transcoded(stream: Any, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("data_prep.count")
    while data := stream.read(_PIECE):
        yield decoder.decode(data).encode(errors="surrogateescape")
    yield decoder.decode(b"", final=True).encode(errors="surrogateescape")


def _encoding(start: bytes) -> tuple[str, int]:
    """Encoding of a text that begins with `start`, and the length of its mark. Without a mark zeros tell it."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)

    def zeros(first: int, step: int) -> float:
        found = start[first::step]
        return found.count(0) / max(1, len(found))

    if zeros(2, 4) > 0.9 and zeros(3, 4) > 0.9:
        return "utf-32-le", 0
    if zeros(0, 4) > 0.9 and zeros(1, 4) > 0.9:
        return "utf-32-be", 0
    if zeros(1, 2) > 0.5 and zeros(0, 2) < 0.1:
        return "utf-16-le", 0
    if zeros(0, 2) > 0.5 and zeros(1, 2) < 0.1:
        return "utf-16-be", 0
    return "utf-8", 0


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(_Pieces(_zstd(raw)), _PIECE)
    if suffix == ".xz":
        return io.BufferedReader(lzma.open(raw), _PIECE)  # type: ignore[arg-type]
    # Arrow's decompression refuses a truncated file and reads several members.
    compression = {".gz": "gzip", ".bz2": "bz2"}.get(suffix)
    if compression:
        return io.BufferedReader(pyarrow.input_stream(raw, compression=compression), _SAMPLE)
    return raw


def _range(raw: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    raw.seek(start)
    while piece := raw.read(min(_PIECE, end - raw.tell())):
        yield piece


def is_plain(path: Path) -> bool:
    """Whether the file holds UTF-8 as it is read, so that its bytes can be read from anywhere."""
    if path.suffix.lower() in COMPRESSED:
        return False
    with path.open("rb") as raw:
        return _encoding(raw.read(_SAMPLE))[0] == "utf-8"


@contextmanager
def open_text(path: Path, start: int = 0, end: int | None = None) -> Iterator[BinaryIO]:
    """Open a plain or compressed (.gz, .bz2, .xz, .zst) text file; what is read is UTF-8 without a mark.

    start, end: bytes of a plain file between which to read.
    """
    with path.open("rb", buffering=_PIECE) as raw:
        if end is not None:
            stream = io.BufferedReader(_Pieces(_range(raw, start, end)), _PIECE)
            if start == 0 and stream.peek(3).startswith(codecs.BOM_UTF8):
                stream.read(3)
            yield stream
            return
        stream = _decompressed(path, raw)
        encoding, mark = _encoding(stream.peek(_SAMPLE)[:_SAMPLE])
        stream.read(mark)
        if encoding != "utf-8":
            stream = io.BufferedReader(_Pieces(_transcoded(stream, encoding)), _PIECE)
        yield stream
