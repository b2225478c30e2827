"""Train one experiment.

accelerate launch [--config_file configs/parallel/NAME.yaml] pretrain/main.py --config configs/experiment/NAME.yaml
    [key=value ...] [--restart] [--print-config]

The same command again goes on from the latest checkpoint. Exit codes: 0 finished; 2 a mistake in what was given; 74 a
disk that is full, over quota or broken: a checkpoint, the metrics or the model could not be written (the checkpoint
before is whole; make room first); 75 stopped on request (SIGTERM, SIGUSR1, SIGHUP, the file RUN_DIR/stop) with a
checkpoint, run it again; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    gc.disable()  # imports make a million objects, and nearly all of them stay: to look through them takes longer

from data_prep.settings import UserError, run_command
from pretrain.config import DataSettings, ExperimentSettings, print_config, read_settings
from pretrain.stop import CANNOT_WRITE, disk_error


def main() -> int:
    """Parse the command line, start the ranks, train; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the experiment, a YAML file")
    parser.add_argument(
        "--print-config", action="store_true", help="show every key, its value and its meaning, and exit"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin the run anew; what its directory holds is kept in RUN_DIR/before/"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance seed=1 batch.size=64")
    arguments = parser.parse_intermixed_args()
    settings = read_settings(arguments.config, arguments.overrides)
    if arguments.print_config:
        print_config(settings)
        return 0
    from pretrain.parallel.strategy import RunFailed

    try:
        return train(settings, arguments.restart and not _starts_again(os.environ))
    except RunFailed as error:  # on every rank alike
        code, message = error.exit_code, str(error) if os.environ.get("RANK", "0") == "0" else ""
    except Exception as error:
        if not (text := disk_error(error)):
            raise
        code, message = CANNOT_WRITE, f"{text}: make room, then run the same command again; checkpoints are whole"
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def train(settings: ExperimentSettings, restart: bool = False) -> int:
    """Start the ranks and train; returns the exit code. Raises RunFailed on every rank where the run cannot go on."""
    from pretrain.parallel.start import start_parallel
    from pretrain.parallel.strategy import RunFailed
    from pretrain.precision import settle
    from pretrain.trainer import Trainer

    gc.freeze()  # what stands now stays: no step has to wait until all of it is looked through
    gc.enable()
    parallel = start_parallel(
        settings.parallel, settings.precision, settings.seed, first=lambda: prepare_data(settings.data)
    )
    settings = settle(settings, parallel, restart)
    trainer = Trainer(settings, settings.data.read(), parallel)
    try:
        code = trainer.run(restart)
    except RunFailed:
        parallel.finish()
        raise
    parallel.finish()
    return code


def _starts_again(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler or launcher starts the same command again, whose --restart has been obeyed by then."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(environment.get(name, "0")) > 0 for name in counts)


def prepare_data(settings: DataSettings) -> None:
    """Make each prepared folder from its `prepare` if it has no manifest. Raises UserError where that fails."""
    script = Path(__file__).resolve().parent.parent / "data_prep" / "prepare.py"
    for folder, prepare in settings.folders:
        if prepare is None or (folder / "manifest.json").exists():
            continue
        print(f"{folder}: not prepared yet; preparing it from {prepare}", flush=True)
        command = [sys.executable, str(script), "--config", str(prepare), f"folder={folder}"]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{folder}: its preparation from {prepare} failed; see above")


if __name__ == "__main__":
    run_command(main)
