"""Settings of every test: properties are drawn the same way each time, and a busy machine is no failure."""

import gc
import os
import random
import signal
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# What `make test-explore` runs: draws of its own each time, so that no fault hides behind one set of draws for ever.
# The seed is printed; `pytest --hypothesis-seed N` with this profile draws the same again.
settings.register_profile(
    "explore", deadline=None, derandomize=False, database=None, suppress_health_check=[HealthCheck.too_slow]
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "project")
settings.load_profile(PROFILE)


def pytest_configure(config: pytest.Config) -> None:
    """Under the profile `explore`: draw a seed unless one was given. Processes of pytest-xdist take the first one's."""
    if PROFILE == "explore" and config.getoption("hypothesis_seed") is None and not hasattr(config, "workerinput"):
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str | None:
    if PROFILE != "explore":
        return None
    seed = config.getoption("hypothesis_seed")
    return f"property tests are drawn anew; the same again: make test-explore SEED={seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, those that need a Slurm before them: the last to run are short.

    Two workers take file by file; with a long one last, one of them would wait for the other.
    """
    weights: Counter[object] = Counter()
    for item in items:
        weights[item.path] += 10 * bool(item.get_closest_marker("slurm")) + bool(item.get_closest_marker("slow"))
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no collection of garbage goes through it again."""
    gc.collect()
    gc.freeze()


# What a shell starts in its background ignores ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's is ignored, and would be inherited
