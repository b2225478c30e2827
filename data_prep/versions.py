"""Whether the packages at hand are as new as pyproject.toml asks: one line where they are not."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def too_old(pyproject: Path = PYPROJECT, version: Callable[[str], str] | None = None) -> str | None:
    """What is older than it may be, and what to type; None where nothing is.

    version: gives the installed version of a package. One that is not installed is not missed here: who needs it says
    so, and some are needed for a part of the work alone.
    """
    version = version or metadata.version
    faults, wanted = [], []
    for line in tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]:
        needed = Requirement(line)
        try:
            found = version(needed.name)
        except metadata.PackageNotFoundError:
            continue
        if not needed.specifier.contains(found, prereleases=True):
            faults.append(f"{needed.name} {found} is installed, {needed.specifier} is needed")
            wanted.append(f"'{line}'")
    return f"{'; '.join(faults)}: pip install {' '.join(wanted)}" if faults else None


def require_versions() -> None:
    """End with exit code 2 and one line where a package is too old: what uses it would fail in words of its own."""
    if PYPROJECT.exists() and (fault := too_old()):
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
