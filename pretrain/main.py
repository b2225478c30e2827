"""Train one experiment.

accelerate launch [--config_file configs/parallel/NAME.yaml] pretrain/main.py --config configs/experiment/NAME.yaml
    [key=value ...] [--print-config]

The same command again goes on from the latest checkpoint. Exit codes: 0 finished; 2 a mistake in what was given;
75 stopped on request (SIGTERM, SIGUSR1, SIGHUP, the file RUN_DIR/stop), run it again; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.settings import UserError, run_command
from pretrain.config import DataSettings, print_config, read_settings
from pretrain.data import Manifest
from pretrain.parallel import Parallel
from pretrain.trainer import Trainer


def main() -> int:
    """Parse the command line, start the ranks, train; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the experiment, a YAML file")
    parser.add_argument(
        "--print-config", action="store_true", help="show every key, its value and its meaning, and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance seed=1 batch.size=64")
    arguments = parser.parse_intermixed_args()
    settings = read_settings(arguments.config, arguments.overrides)
    if arguments.print_config:
        print_config(settings)
        return 0
    parallel = Parallel.start(settings.parallel, settings.precision, settings.seed)
    if parallel.is_main:
        prepare_data(settings.data)
    parallel.barrier()
    try:
        code = Trainer(settings, Manifest.read(settings.data.folder), parallel).run()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{error}: free some space and run the same command again; checkpoints are whole") from None
    parallel.finish()
    return code


def prepare_data(settings: DataSettings) -> None:
    """Make the prepared folder from `data.prepare` if it has no manifest. Raises UserError where that fails."""
    if settings.prepare is None or (settings.folder / "manifest.json").exists():
        return
    print(f"{settings.folder}: not prepared yet; preparing it from {settings.prepare}", flush=True)
    script = Path(__file__).resolve().parent.parent / "data_prep" / "prepare.py"
    command = [sys.executable, str(script), "--config", str(settings.prepare), f"folder={settings.folder}"]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{settings.folder}: its preparation from {settings.prepare} failed; see above")


if __name__ == "__main__":
    run_command(main)
