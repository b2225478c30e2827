#!/usr/bin/env bash
# Trains on every GPU of this machine, one rank each (without GPUs: one rank, or RANKS of them, on the CPU):
#   launchers/torchrun.sh --config configs/experiment/smoke.yaml [key=value ...]
# Exits with 75 when the run was asked to stop, has written a checkpoint and can be started again.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
# Several ranks on one machine share its cores; torchrun's own default is one thread a rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
exec "${PYTHON:-python}" launchers/torchrun.py --standalone --nproc-per-node="$ranks" pretrain/main.py "$@"
