import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from data_prep import versions
from data_prep.versions import PYPROJECT, require_versions, too_old


def installed(**found: str):
    """`importlib.metadata.version` of an environment that holds these alone."""

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    return version


def test_the_versions_at_hand_are_new_enough() -> None:
    assert too_old() is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"torch": "2.10.1"}, "torch 2.10.1 is installed, >=2.11 is needed: pip install 'torch>=2.11'"),
        ({"torch": "2.11.0+cu130", "transformers": "5.17.0"}, None),
        ({"torch": "2.12.0a0+git1"}, None),  # images carry torch built between releases
        ({}, None),
        (
            {"torch": "2.9.0", "accelerate": "1.2.0"},
            "torch 2.9.0 is installed, >=2.11 is needed; accelerate 1.2.0 is installed, >=1.15 is needed: "
            "pip install 'torch>=2.11' 'accelerate>=1.15'",
        ),
    ],
)
def test_names_package_found_needed_and_what_to_type(tmp_path: Path, found: dict[str, str], expected: str) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["torch>=2.11", "transformers>=5.17", "accelerate>=1.15"]\n')
    assert too_old(pyproject, installed(**found)) == expected


def test_ends_with_one_line_and_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(versions, "too_old", lambda: too_old(PYPROJECT, installed(wandb="0.1")))
    with pytest.raises(SystemExit) as ended:
        require_versions()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: wandb 0.1 is installed, >=") and "pip install 'wandb>=" in line


# Replaces what is installed by a torch of long ago, then runs a command as `python FILE` does.
OLD = """
import importlib.metadata, runpy, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "1.0" if name == "torch" else version(name)
sys.argv[:] = sys.argv[1:] + ["--help"]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", ["pretrain/main.py", "launchers/compare.py"])
def test_commands_say_so_and_no_more(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OLD, command], cwd=PYPROJECT.parent, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: torch 1.0 is installed, >=") and "pip install 'torch>=" in line
