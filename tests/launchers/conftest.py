"""What the tests of the launchers share: one Slurm for all of them, started where the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import slurm
from tests.helpers.slurm import Slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    with slurm.running() as running:
        yield running
