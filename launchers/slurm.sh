# What the job scripts share. Each sources it from the repository's root, under `set -euo pipefail`.
#
# launchers/site.sh is read first, if there is one: bash in which a cluster sets up what its jobs need. It is not kept in
# git. It may load modules, export variables (NCCL_*, PYTHON, a scratch folder) and fill two arrays:
#   CONTAINER=(apptainer exec --nv --bind /scratch /scratch/images/mor.sif)   put before every command of a job
#   SRUN_OPTIONS=(--container-image=/scratch/images/mor.sqsh)                 options of srun, for pyxis and the like
# The container needs Python with this project's packages, as `python` or what PYTHON names, and no Slurm.
# shellcheck shell=bash

! declare -F requeue >/dev/null || return 0 # read already, by the script that reads this one

say() { echo "[slurm] $*"; }

# Slurm's signals are held from here on: whoever sent one expects the job to stop in order, also while it still starts.
# shellcheck disable=SC2034 # read by the job scripts
stopping=
trap 'stopping=1; say "asked to stop at $(date +%T)"' USR1 TERM

export PYTHON=${PYTHON:-python}
CONTAINER=() SRUN_OPTIONS=()
if [[ -e launchers/site.sh ]]; then
    set +u # the scripts of modules and environments are not written for it
    # shellcheck disable=SC1091
    source launchers/site.sh
    set -u
fi

# The name by which Slurm's commands mean this job alone. The last task of an array has the array's id as its
# SLURM_JOB_ID, which to squeue and scontrol means every task of it.
job=${SLURM_JOB_ID:?this script is for sbatch}
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:?}; fi

# Python on this node, once, where the ranks' Python is: "${python_here[@]}" SCRIPT ...
python_here=("${CONTAINER[@]}" "$PYTHON")
if ((${#SRUN_OPTIONS[@]})); then
    python_here=(srun --quiet --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${python_here[@]}")
fi

# State of this job, or of this task alone: squeue's, or scontrol's where that fails. Fails where neither answers.
state_of_job() {
    local state
    state=$(timeout 60 squeue --noheader --jobs="$job" --format=%T) && [[ -n $state ]] && echo "$state" && return
    timeout 60 scontrol show job --oneliner "$job" | grep -oP ' JobState=\K\S+'
}

# requeue WHY: put this job, or this task alone, back into the queue, which ends this script. Returns where that must not
# be, as for a job that was cancelled, or cannot be. A controller that is being restarted is waited for.
requeue() {
    local try state
    for ((try = 0; try < 60; try++)); do
        if ((try)); then sleep $((try < 5 ? 1 : 10)); fi
        if ! state=$(state_of_job); then
            say "Slurm does not say how this job stands; asked again"
            continue
        fi
        case $state in
            # COMPLETING: ended by scancel or by the time limit, while the ranks were still writing
            RUNNING | SIGNALING | RESIZING | STAGE_OUT) ;;
            *)
                say "$1, and the job is $state: not put back into the queue"
                return
                ;;
        esac
        say "$1: back into the queue"
        trap - USR1 TERM
        if timeout 60 scontrol requeue "$job"; then
            sleep 300 # Slurm ends this script here
            return
        fi
    done
    say "$1, but Slurm does not take it back into the queue: submit it again, it goes on from there"
}

# interruptible ARGUMENTS: run Python here; a stop of the job stops it, and puts the job back into the queue.
interruptible() {
    local child status
    "${python_here[@]}" "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if [[ -n $stopping ]]; then kill -TERM "$child" || true; fi
        wait "$child" || true # ended early by a signal
    done
    wait "$child" && status=0 || status=$?
    if ((status != 0 && ${SLURM_RESTART_COUNT:-0} < 20)) && [[ -n $stopping ]]; then
        requeue "stopped, and it goes on where it was"
    fi
    return "$status"
}
