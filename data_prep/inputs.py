"""Which files a corpus consists of, what is passed over beside them, and whether they are still the same.

A corpus is known by the names (relative to the deepest folder that holds all), sizes and sha256 of its files, never by
where it lies: the same files under a relative or an absolute path, or moved, are one corpus.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import sha256_of
from data_prep.settings import UserError
from data_prep.streams import COMPRESSED

_NAMES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
}
SUFFIXES = {
    kind: (*names, *(name + more for name in names for more in COMPRESSED)) if kind != "parquet" else names
    for kind, names in _NAMES.items()
}
HASHED_ALWAYS = 256 << 20  # so many bytes are hashed at once; of more, those that changed after the manifest


@dataclass
class Files:
    """The files that a source reads, in reading order, and of its folders what is passed over and what is linked."""

    paths: list[Path] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)

    def remarks(self, kind: str) -> list[str]:
        """What a user should know: files of the folders that are not read, folders that lie elsewhere."""
        lines = []
        if self.passed_over:
            kinds = Counter("".join(path.suffixes[-2:]).lower() or path.name for path in self.passed_over)
            counted = ", ".join(f"{count} {safe(suffix)}" for suffix, count in kinds.most_common(8))
            lines.append(
                f"passed over {len(self.passed_over)} files that are not {' or '.join(_NAMES[kind])} ({counted}): "
                f"{_some(self.passed_over)}; name them in source.paths to read them"
            )
        if self.linked:
            lines.append(f"followed {len(self.linked)} links to folders: {_some(self.linked)}")
        return lines


def safe(name: str | os.PathLike[str]) -> str:
    """A file's name as text that can be printed and stored: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _some(paths: Sequence[Path], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(safe(path) for path in sorted(paths)[:most]) + more


def find_files(kind: str, patterns: Sequence[str]) -> Files:
    """Files, folders (searched through, links too, hidden ones not) and glob patterns, sorted, without repetition."""
    found = Files()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            before = len(found.paths)
            _search(path, kind, found, ())
            looked_for = f"no {' or '.join(_NAMES[kind])} file in this folder"
            matched = len(found.paths) > before
        elif path.exists():
            found.paths.append(path)
            matched, looked_for = True, ""
        else:
            matches = [Path(p) for p in glob.glob(_literal_folders(path), recursive=True) if Path(p).is_file()]
            found.paths += matches
            matched, looked_for = bool(matches), "no such file"
        if not matched:
            passed = f"; {'; '.join(found.remarks(kind))}" if found.passed_over else ""
            raise UserError(f"source.paths: {safe(pattern)}: {looked_for}{passed}")
    unique: dict[str, Path] = {}
    for path in sorted(found.paths, key=os.path.abspath):
        unique.setdefault(os.path.realpath(path), path)  # one file under two names is read once
    found.paths = list(unique.values())
    read = set(unique)
    found.passed_over = [path for path in found.passed_over if os.path.realpath(path) not in read]
    return found


def _literal_folders(pattern: Path) -> str:
    """A glob pattern in which brackets of folders that are there are no pattern."""
    there = next(folder for folder in pattern.parents if folder.is_dir())
    return str(Path(glob.escape(str(there)), pattern.relative_to(there)))


def _search(folder: Path, kind: str, found: Files, above: tuple[str, ...]) -> None:
    """Add what `folder` holds. above: real paths of the folders that led here, so that a circle of links ends."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{safe(folder)}: cannot be searched: {error.strerror}") from None
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue  # of an editor, a version control system or an unfinished download
        if entry.is_dir():
            if entry.is_symlink():
                found.linked.append(path)
            _search(path, kind, found, (*above, real))
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES[kind]):
            found.paths.append(path)
        else:
            found.passed_over.append(path)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Each path relative to the deepest folder that holds all of them."""
    if not paths:
        return []
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [safe(os.path.relpath(os.path.abspath(path), root)) for path in paths]


def describe(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file: what the manifest records of a corpus."""
    return [
        {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in zip(names_of(paths), paths, strict=True)
    ]


def signature(paths: Sequence[Path]) -> list[list[int]]:
    """What changes whenever one of the files is written, replaced or given another time."""
    stats = [path.stat() for path in paths]
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]


def signature_time(paths: Sequence[Path]) -> float:
    """When one of the files was last written, replaced or given another time, in seconds."""
    return max(max(status.st_mtime, status.st_ctime) for status in (path.stat() for path in paths))


def differences(paths: Sequence[Path], stated: Sequence[dict[str, Any]], since: float) -> Iterator[str]:
    """How the files differ from those that a manifest states, one line each.

    since: time of the manifest in seconds. Where the corpus is large, only files that were touched after it are read.
    """
    known = {item["name"]: item for item in stated}
    hashed = all("sha256" in item for item in stated)
    if not hashed:  # of a manifest that states paths as they were given, and no sha256
        known = dict(zip(names_of(paths), stated, strict=False)) if len(stated) == len(paths) else known
    names = names_of(paths)
    yield from (f"{name} is new" for name in sorted(set(names) - set(known)))
    yield from (f"{name} is gone" for name in sorted(set(known) - set(names)))
    total = sum(path.stat().st_size for path in paths)
    for name, path in zip(names, paths, strict=True):
        if name not in known:
            continue
        status = path.stat()
        touched = max(status.st_mtime, status.st_ctime) >= since
        if status.st_size != known[name]["bytes"]:
            yield f"{name} has {status.st_size} bytes, had {known[name]['bytes']}"
        elif not hashed:
            if touched:
                yield f"{name} was written after the manifest, which states no sha256 to compare it with"
        elif (total <= HASHED_ALWAYS or touched) and sha256_of(path) != known[name]["sha256"]:
            yield f"{name} has other content"
