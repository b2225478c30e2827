"""Submit a run, a comparison or data preparations to Slurm, after checking that they can work.

python launchers/submit.py --config configs/experiment/NAME.yaml --nodes 2 --gpus-per-node 8 [--dry-run] [key=value ...]
python launchers/submit.py --compare configs/compare/NAME.yaml --gpus-per-node 1 [--dry-run] [key=value ...]
python launchers/submit.py --prepare configs/data/ONE.yaml configs/data/TWO.yaml [--dry-run] [key=value ...]
python launchers/submit.py --prepare configs/data/LARGE.yaml --tasks 256 --nodes 4 [--dry-run] [key=value ...]
python launchers/submit.py --status configs/compare/NAME.yaml [key=value ...]

Jobs that depend on each other: the data's preparation where the data is missing; an array for each round of the
comparison's sweeps; the run, or an array with a task for each run of the comparison that is not finished; the report.
Of a comparison with `until` the report's job submits the seeds that are still wanted, with a report after them again,
up to `most_seeds`. `--dry-run` prints the commands, as a shell script that would submit the same. Refused, with the
numbers: a batch that does not divide among the ranks, and a model that does not fit into the GPUs.

CPUs and memory are asked for in proportion to the GPUs, as sinfo describes the partition's nodes. The preparation and
the report need no GPU: they go to --cpu-partition, and --sbatch, where constraints on GPUs stand, is not for them.
Modules, containers and variables of the cluster: launchers/site.sh, see launchers/slurm.sh. --status shows a submitted
comparison at a glance: how each round of its sweeps stands and what won; each run's task, state, step, share of its
budget, loss and requeues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from data_prep.settings import UserError, run_command
from launchers import corpus, status
from launchers.grid import (
    CompareSettings,
    PlannedRun,
    cells_of,
    data_shape,
    more_seeds,
    plan_best,
    plan_noise,
    plan_round,
    plan_runs,
    read_compare,
    round_count,
    round_size,
    shown_apart,
    take_records,
    winner,
    with_seeds,
)
from model.memory import Memory, training_memory
from pretrain.config import ExperimentSettings, make_model_config, micro_size_of, read_settings
from pretrain.data import accumulation_steps
from pretrain.parallel.settings import ParallelSettings, resolve_strategy
from pretrain.plan import placement_of
from pretrain.precision import expected

REPOSITORY = Path(__file__).resolve().parent.parent
LOGS = "runs/slurm"
GIB = 2**30
CPUS_PER_GPU = 8  # where sinfo says nothing
CPUS = 8  # of a preparation
CPU_MEMORY = 16 * GIB  # of a job that needs no GPU
RANK_MEMORY = 6 * GIB  # host memory of a rank: Python, torch, the driver's part, mapped data


@dataclass(frozen=True)
class Job:
    """One sbatch command, the word `sbatch` left out.

    after: what must have happened before, as in ("afterok", "prepare"): kind of dependency and names of earlier jobs.
    """

    name: str
    command: list[str]
    after: tuple[str, ...] = ()


# --- what is submitted ------------------------------------------------------------------------------------------


def plan_run(options: argparse.Namespace) -> list[Job]:
    """The jobs of one experiment. Raises UserError where it cannot run on the nodes of the request."""
    settings = read_settings(options.config, options.overrides)
    check(settings, options)
    prepare = prepare_jobs(settings, options)
    restart = ["--restart"] if options.restart else []
    arguments = ["--config", options.config, *restart, *options.overrides, world_size(options)]
    named = [f"--job-name={settings.name}", f"--output={LOGS}/%x-%j.log"]
    command = [*named, *resources(options, [settings]), "launchers/pretrain.sbatch", *arguments]
    return [*prepare, Job("pretrain", command, after(prepare))]


def plan_comparison(options: argparse.Namespace) -> list[Job]:
    """The jobs of a comparison: an array over its unfinished runs and the report. Raises UserError as `plan_run`."""
    compare, runs = read_comparison(options)
    missing = [number for number, run in enumerate(runs) if not run.finished()]
    for number in missing:
        check(runs[number].settings, options)
    report = [f"--baseline={compare.baseline}"] if compare.baseline else []
    report += ["--published"] if compare.published else []
    report += ["--allow-mixed"] if shown_apart(compare) else []
    report += [f"--output={compare.output / compare.report}"] if compare.report != "report" else []
    report += ["--evidence", *map(str, compare.evidence)] if compare.evidence else []
    named = [f"--job-name={compare.output.name}", f"--output={LOGS}/%x-%A_%a.log"]
    tasks = ",".join(map(str, missing)) + (f"%{options.at_once}" if options.at_once else "")
    jobs = prepare_jobs(runs[0].settings, options) if missing else []
    if missing:
        arguments = ["--compare", options.compare, *options.overrides, f"overrides.{world_size(options)}"]
        decided = {runs[number].decided for number in missing} - {None}
        if len(decided) == 1:  # here and once, not on each task's node
            arguments.append(f"overrides.precision={decided.pop()}")
        wanted = resources(options, [runs[number].settings for number in missing])
        # seeds are added to sweeps that are over, also where one of their runs diverged
        sweeps = [] if options.add_seeds else sweep_jobs(compare, jobs, [*named, *wanted], arguments, options)
        waits = ("afterany", sweeps[-1].name) if sweeps else after(jobs)
        jobs += sweeps
        array = [*named, f"--array={tasks}", *wanted, "launchers/compare_array.sbatch", *arguments]
        jobs.append(Job("compare", array, waits))
    # afterany: a run that failed is missing from the report, and no reason to have none
    named = [f"--job-name={compare.output.name}-report", f"--output={LOGS}/%x-%j.log"]
    command = [*named, *cpu_resources(options, 2), "launchers/report.sbatch", str(compare.output), *report]
    if compare.until is not None:
        command += ["--", *request(spelt_out(options, [run.settings for run in runs]))]
    return [*jobs, Job("report", command, ("afterany", "compare") if missing else ())]


def request(options: argparse.Namespace) -> list[str]:
    """The arguments of this program that ask for the comparison once more."""
    given = [f"--nodes={options.nodes}", f"--gpus-per-node={options.gpus_per_node}"]
    given += [f"--gpu-memory={options.gpu_memory:g}", *([f"--at-once={options.at_once}"] if options.at_once else [])]
    given += [f"--resources={options.resources}", f"--cpu-resources={options.cpu_resources}"]
    return ["--compare", options.compare, *given, *options.overrides]


def spelt_out(options: argparse.Namespace, runs: Sequence[ExperimentSettings]) -> argparse.Namespace:
    """The request with all of sbatch's options, as they are here: where a job asks again there may be no sinfo."""
    words = {"resources": resources(options, runs), "cpu_resources": cpu_resources(options, 2)}
    return argparse.Namespace(**vars(options) | {name: shlex.join(given) for name, given in words.items()})


def add_seeds(options: argparse.Namespace) -> None:
    """Print the script that submits the seeds which `until` still wants after the report; or, once it was submitted,
    note its array. Where a run is missing, say so on stderr: the report knows too little then.
    """
    compare, runs = read_comparison(options)
    options = spelt_out(options, [run.settings for run in runs])
    if missing := [run.label for run in runs if not run.finished()]:
        text = f"until: no seeds are added while these are not finished: {', '.join(missing)}; go on with"
        print(text, command_of(options), sep="\n", file=sys.stderr)
        return
    path = compare.output / compare.report / "results.json"
    seeds = more_seeds(compare, json.loads(path.read_text(encoding="utf-8")))
    if not seeds:
        return
    options.overrides = replaced(options.overrides, with_seeds(compare, seeds))
    if options.submitted:
        remember(options, {"compare": options.submitted})
        return
    refused = f"until: seeds {', '.join(map(str, seeds))} are wanted, and Slurm did not take them from here; type"
    told = shlex.join(["printf", r"%s\n", refused, command_of(options)])
    print(f"trap {shlex.quote(f'{told} >&2')} ERR", f"mkdir -p {LOGS}", *script(plan_comparison(options)), sep="\n")


def command_of(options: argparse.Namespace) -> str:
    """What to type for the request."""
    return shlex.join(["python", "launchers/submit.py", *request(options)])


def replaced(overrides: Sequence[str], changes: Mapping[str, object]) -> list[str]:
    """Overrides with other values for some keys."""
    kept = [item for item in overrides if item.partition("=")[0] not in changes]
    return [*kept, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]


def sweep_jobs(
    compare: CompareSettings,
    before: Sequence[Job],
    request: Sequence[str],
    arguments: Sequence[str],
    options: argparse.Namespace,
) -> list[Job]:
    """An array for each round of the sweeps that is not over. Which runs a round has, its tasks learn when they start.

    A run that failed comes last in its round and holds up no other, so that a round waits for the end of the one before
    it, however that came; the first one for the data.
    """
    jobs: list[Job] = []
    for number in range(round_count(compare)):
        with suppress(UserError):  # the round before it has still to run
            if all(run.finished() for run in plan_round(compare, number, options.gpus_per_node > 0)):
                continue
        last = round_size(compare, number) - 1
        tasks = f"--array=0-{last}" + (f"%{options.at_once}" if options.at_once else "")
        command = [*request, tasks, "launchers/compare_array.sbatch", f"--round={number}", *arguments]
        jobs.append(Job(name_of_round(number), command, ("afterany", jobs[-1].name) if jobs else after(before)))
    return jobs


def name_of_round(number: int) -> str:
    """The job of a round of the sweeps."""
    return f"sweep{number}"


def read_comparison(options: argparse.Namespace) -> tuple[CompareSettings, list[PlannedRun]]:
    """The comparison and its runs; the place of a run in the list is its task in the array."""
    compare, gpus = read_compare(Path(options.compare), options.overrides), options.gpus_per_node > 0
    if options.round is not None:
        return compare, plan_round(compare, options.round, gpus)
    return compare, [*plan_runs(compare, gpus), *plan_noise(compare, gpus), *plan_best(compare, gpus)]


def remember(options: argparse.Namespace, numbers: Mapping[str, str]) -> None:
    """Note which arrays hold the comparison's runs and the rounds of its sweeps, for --status."""
    compare, runs = read_comparison(options)
    for number in range(round_count(compare)):
        if name_of_round(number) in numbers:
            status.remember_round(compare, number, numbers[name_of_round(number)])
    if "compare" in numbers:
        status.remember(compare, runs, numbers["compare"], options.add_seeds)


def run_of_task(options: argparse.Namespace) -> PlannedRun:
    """The run of a task. Raises UserError where a sweep that decides its settings has not ended."""
    compare, runs = read_comparison(options)
    open_ones = [cell.label for cell in cells_of(compare) if winner(compare, cell) is None]
    if options.round is None and open_ones:
        raise UserError(f"{options.compare}: the sweep of {', '.join(open_ones)} has no winner yet; submit it again")
    return runs[options.print_run]


def prepare_jobs(settings: ExperimentSettings, options: argparse.Namespace) -> list[Job]:
    """A job for each of the data's folders that is not there. Raises UserError for one that nothing can make."""
    jobs, data = [], settings.data
    names = list(data.mixture) or [""]
    for name, (folder, config) in zip(names, data.folders, strict=True):
        if (folder / "manifest.json").exists():
            continue
        if config is None:
            key = f"data.mixture.{name}" if name else "data"
            raise UserError(
                f"{folder / 'manifest.json'}: no such file, and {key}.prepare does not say how to make it; set it, or "
                f"prepare the folder first: python launchers/submit.py --prepare CONFIG folder={folder}"
            )
        word = re.sub(r"\W", "_", f"prepare_{name}") if name else "prepare"
        jobs.append(prepare_job(options, [str(config)], [f"folder={folder}"], word))
    return jobs


def after(jobs: Sequence[Job]) -> tuple[str, ...]:
    """The dependency on these jobs' success."""
    return ("afterok", *(job.name for job in jobs)) if jobs else ()


def prepare_job(
    options: argparse.Namespace, configs: Sequence[str], overrides: Sequence[str], name: str = "prepare"
) -> Job:
    """The array that prepares one data configuration a task, on one node each and without GPUs."""
    named = ["--job-name=prepare", f"--output={LOGS}/%x-%A_%a.log", f"--array=0-{len(configs) - 1}"]
    time = [f"--time={options.time}"]
    wanted = [*named, *cpu_resources(options, options.cpu_cpus or CPUS), *time]
    return Job(name, [*wanted, "launchers/prepare_array.sbatch", *configs, *overrides])


# --- the request ------------------------------------------------------------------------------------------------


def check(settings: ExperimentSettings, options: argparse.Namespace) -> None:
    """Raise UserError where the batch does not divide among the ranks, or the model does not fit into their memory."""
    micro_size = micro_size_of(settings.batch, ranks(options))
    accumulation_steps(settings.batch.size, micro_size, ranks(options))
    memory = estimate(settings, options)
    if not options.gpus_per_node or memory.total <= options.gpu_memory * GIB:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(memory).items() if size >= GIB / 20)
    precision = expected(settings.precision, options.gpus_per_node > 0)
    raise UserError(
        f"{settings.name}: a rank needs about {memory.total / GIB:.1f} GiB, a GPU has {options.gpu_memory:g} GiB "
        f"(--gpu-memory); in GiB: {parts}. This is for {ranks(options)} ranks, strategy "
        f"{strategy_of(settings, options).strategy}, micro-batches of {micro_size} sequences, recompute "
        f"{settings.recompute}, {precision}. {what_fits(settings, options)}"
    )


def what_fits(settings: ExperimentSettings, options: argparse.Namespace) -> str:
    """The single changes of the settings after which the model fits."""
    micro_size = micro_size_of(settings.batch, ranks(options))
    changes: dict[str, dict[str, object]] = {
        "recompute=block": {"recompute": "block"},
        "parallel=configs/parallel/fsdp2.yaml": {"parallel": ParallelSettings(strategy="fsdp2")},
    }
    for smaller in (size for size in range(micro_size - 1, 0, -1) if micro_size % size == 0):
        changes[f"batch.micro_size={smaller}"] = {"batch": settings.batch.model_copy(update={"micro_size": smaller})}
    fits = [
        change
        for change, update in changes.items()
        if estimate(settings.model_copy(update=update), options).total <= options.gpu_memory * GIB
    ]
    return (
        f"Each of these would fit: {', '.join(fits)}" if fits else "Combine smaller micro-batches, recompute and fsdp2"
    )


def estimate(settings: ExperimentSettings, options: argparse.Namespace) -> Memory:
    """Memory of one rank. Raises UserError where the strategy cannot run on these ranks."""
    parallel, world_size = strategy_of(settings, options), ranks(options)
    vocab_size, sequence_length = data_shape(settings)
    fields = {"max_position_embeddings": sequence_length, **settings.model}
    config = make_model_config(fields if vocab_size is None else fields | {"vocab_size": vocab_size})
    placement = placement_of(settings, parallel, world_size, options.gpus_per_node > 0)
    return training_memory(config, sequence_length, micro_size_of(settings.batch, world_size), placement)


def strategy_of(settings: ExperimentSettings, options: argparse.Namespace) -> ParallelSettings:
    """The strategy as torchrun's ranks will settle it."""
    return resolve_strategy(settings.parallel, {"WORLD_SIZE": str(ranks(options))})


def ranks(options: argparse.Namespace) -> int:
    """Ranks of one run: one a GPU, or one a node on nodes without GPUs."""
    return options.nodes * max(1, options.gpus_per_node)


def world_size(options: argparse.Namespace) -> str:
    """The override by which a run refuses to start on any other number of ranks than was asked for."""
    return f"parallel.world_size={ranks(options)}"


@dataclass(frozen=True)
class Node:
    """A kind of node as sinfo describes it. memory: bytes, 0 where Slurm does not share memory out."""

    cpus: int
    memory: int
    gpus: int


def nodes_of(partition: str | None) -> list[Node]:
    """The kinds of nodes of a partition (None: the default one); none where sinfo is absent or says nothing."""
    if shutil.which("sinfo") is None:
        return []
    command = ["sinfo", "--noheader", "--format=%P|%c|%m|%G", *([f"--partition={partition}"] if partition else [])]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    nodes = set()
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, cpus, mebibytes, resources = line.split("|")
        if partition or name.endswith("*"):
            gpus = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources)))
            memory = int(mebibytes.rstrip("+")) * 2**20
            nodes.add(Node(int(cpus.rstrip("+")), memory if memory > GIB else 0, gpus))
    return sorted(nodes, key=lambda node: (node.gpus, node.cpus, node.memory))


def resources(options: argparse.Namespace, runs: Sequence[ExperimentSettings]) -> list[str]:
    """sbatch's options for the nodes of one run, whichever of `runs` it is."""
    if options.resources is not None:
        return shlex.split(options.resources)
    tasks = max(1, options.gpus_per_node) if options.task_per_gpu else 1
    given = [f"--nodes={options.nodes}", f"--ntasks-per-node={tasks}"]
    if options.gpus_per_node:
        given.append(f"--gpus-per-node={options.gpus_per_node}")
    nodes = [node for node in nodes_of(options.partition) if node.gpus >= options.gpus_per_node]
    if not asks(options.sbatch, "--cpus-per-task", "-c", "--exclusive"):
        given.append(f"--cpus-per-task={cpus_of_node(options, nodes) // tasks}")
    memory = options.mem or default_memory(options, nodes, runs)
    if memory and not asks(options.sbatch, "--mem", "--mem-per-cpu", "--mem-per-gpu"):
        given.append(f"--mem={memory}")
    signal = f"--signal=B:USR1@{options.grace}"
    return [*given, f"--time={options.time}", signal, *placement(options, options.partition), *options.sbatch]


def asks(given: Sequence[str], *names: str) -> bool:
    """Whether one of these options of sbatch is among those given."""
    return any(option.partition("=")[0].split()[0] in names for option in given)


def cpus_of_node(options: argparse.Namespace, nodes: Sequence[Node]) -> int:
    """CPUs of one node of a run: those that belong to its GPUs; on nodes without GPUs all."""
    gpus = options.gpus_per_node
    if options.cpus_per_gpu:
        return options.cpus_per_gpu * max(1, gpus)
    if not nodes:
        return CPUS_PER_GPU * max(1, gpus)
    return max(1, gpus, min(node.cpus * gpus // node.gpus if gpus else node.cpus for node in nodes))


def default_memory(
    options: argparse.Namespace, nodes: Sequence[Node], runs: Sequence[ExperimentSettings]
) -> str | None:
    """Memory of a node of a run, for --mem: its GPUs' share, but at least what the run needs. None: not shared out."""
    gpus = options.gpus_per_node
    needed = max(host_memory(settings, options) for settings in runs)
    if not nodes:
        return f"{math.ceil(needed / GIB)}G"
    if not all(node.memory for node in nodes):
        return None
    share = min(node.memory * gpus // node.gpus if gpus else node.memory for node in nodes)
    return f"{min(max(share, needed), min(node.memory for node in nodes)) // 2**20}M"


def host_memory(settings: ExperimentSettings, options: argparse.Namespace) -> int:
    """Bytes of a node's memory that a run needs: its ranks, what they offload, the copy of a checkpoint that is being
    written, and the whole model where it is built and exported."""
    memory = estimate(settings, options)
    copied = memory.parameters + memory.optimizer + memory.host
    # at most: where ranks do not share parameters each has them all
    whole = (memory.parameters or memory.host) * ranks(options)
    return max(1, options.gpus_per_node) * (RANK_MEMORY + copied + memory.host) + 2 * min(whole, 64 * GIB)


def cpu_resources(options: argparse.Namespace, cpus: int) -> list[str]:
    """sbatch's options for a job of one node that needs no GPU."""
    if options.cpu_resources is not None:
        return shlex.split(options.cpu_resources)
    partition = options.cpu_partition or options.partition
    nodes, given = nodes_of(partition), ["--nodes=1", "--ntasks=1"]
    if not asks(options.cpu_sbatch, "--cpus-per-task", "-c"):
        given.append(f"--cpus-per-task={min([cpus, *(node.cpus for node in nodes)])}")
    if all(node.memory for node in nodes) and not asks(options.cpu_sbatch, "--mem", "--mem-per-cpu"):
        memory = min([CPU_MEMORY, *(node.memory for node in nodes)])
        given.append(f"--mem={options.cpu_mem or f'{memory // 2**20}M'}")
    return [*given, *placement(options, partition), *options.cpu_sbatch]


def task_resources(options: argparse.Namespace) -> tuple[dict[str, str], int]:
    """sbatch's options for one of --tasks on --nodes nodes, its share of a node, and its CPUs."""
    partition = options.cpu_partition or options.partition
    nodes, on_node = nodes_of(partition), -(-options.tasks // options.nodes)
    cpus = options.cpu_cpus or max(1, min([node.cpus for node in nodes] or [on_node]) // on_node)
    memory = options.cpu_mem
    if memory is None and nodes and all(node.memory for node in nodes):
        memory = f"{min(node.memory for node in nodes) // on_node // 2**20}M"
    given = [f"--mem={memory}"] if memory and not asks(options.cpu_sbatch, "--mem", "--mem-per-cpu") else []
    given += [*placement(options, None), *options.cpu_sbatch]
    wrong = [option for option in given if not option.startswith("--")]
    if wrong:
        raise UserError(f"--cpu-sbatch={wrong[0]}: write it as --name=value")
    return {name: value for name, _, value in (option[2:].partition("=") for option in given)}, cpus


def placement(options: argparse.Namespace, partition: str | None) -> list[str]:
    """sbatch's options for where and on whose account."""
    named = {"partition": partition, "account": options.account, "qos": options.qos}
    return [f"--{name}={value}" for name, value in named.items() if value]


# --- submission -------------------------------------------------------------------------------------------------


def submit(jobs: Sequence[Job], dry_run: bool) -> dict[str, str]:
    """Submit the jobs in order, each with its dependency, or print the commands; name -> number.

    Raises UserError with sbatch's message where it refuses one.
    """
    numbers: dict[str, str] = {}
    if dry_run:
        print(f"cd {shlex.quote(str(REPOSITORY))} && mkdir -p {LOGS} && export PYTHON={shlex.quote(sys.executable)}")
        print(*script(jobs), sep="\n")
        return numbers
    for job in jobs:
        numbers[job.name] = call(["sbatch", "--parsable", *waiting(job, numbers), *job.command])
        print(f"{job.name}: job {numbers[job.name]}")
    return numbers


def script(jobs: Sequence[Job]) -> list[str]:
    """The lines of a shell script that submits the jobs, each number in a variable of its job's name."""
    variables = {job.name: f"${job.name}" for job in jobs}
    return [
        f"{job.name}=$({' '.join(['sbatch --parsable', *waiting(job, variables), shlex.join(job.command)])})"
        for job in jobs
    ]


def waiting(job: Job, numbers: Mapping[str, str]) -> list[str]:
    """sbatch's option for what a job waits for. numbers: of the jobs before it."""
    kind, *names = job.after or ("",)
    return [f"--dependency={':'.join([kind, *(numbers[name] for name in names)])}"] if names else []


def call(command: Sequence[str]) -> str:
    """Run sbatch from the repository's root; the job's number. Raises UserError where it fails."""
    (REPOSITORY / LOGS).mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHON": sys.executable}
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("no sbatch here: run this where Slurm is, or add --dry-run") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}\nsbatch refused it: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER


# --- command line -----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see its --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="one experiment, configs/experiment/*.yaml")
    what.add_argument(
        "--compare", metavar="FILE", help="a comparison, configs/compare/*.yaml; the request is each run's"
    )
    what.add_argument("--status", metavar="FILE", help="show how the sweeps and runs of a comparison stand")
    what.add_argument("--prepare", metavar="FILE", nargs="+", help="data, configs/data/*.yaml; a task for each")
    parser.add_argument("--tasks", type=positive, help="share one --prepare among so many tasks, on --nodes nodes")
    parser.add_argument("--nodes", type=positive, default=1, help="nodes of a run")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="GPUs and ranks of a node; 0: one rank on its CPUs"
    )
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="memory of one GPU")
    parser.add_argument("--task-per-gpu", action="store_true", help="let Slurm start the ranks, in place of torchrun")
    parser.add_argument(
        "--cpus-per-gpu", type=positive, help="cores of each rank; default: the GPU's share of its node"
    )
    parser.add_argument("--mem", metavar="SIZE", help="memory of each node, as for sbatch; default: the GPUs' share")
    parser.add_argument("--time", default="24:00:00", help="time limit of a job; a run goes on in the next one")
    parser.add_argument("--grace", type=positive, default=300, help="seconds before the limit in which a run may stop")
    parser.add_argument("--at-once", type=positive, help="runs of a comparison at the same time")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other, of runs: --sbatch=--constraint=a100",
    )
    parser.add_argument(
        "--resources", metavar="WORDS", help="all of sbatch's options for a run's nodes, in place of these"
    )
    cpu = parser.add_argument_group("the preparation and the report, which need no GPU")
    cpu.add_argument("--cpu-partition", metavar="NAME", help="default: that of the runs")
    cpu.add_argument("--cpu-cpus", type=positive, metavar="N", help="cores of a preparation; default: 8")
    cpu.add_argument("--cpu-mem", metavar="SIZE", help="memory of each; default: 16G, or all of a smaller node")
    cpu.add_argument("--cpu-sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch, for these jobs")
    cpu.add_argument("--cpu-resources", metavar="WORDS", help="as --resources, for these jobs")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="of --config: begin the run anew; its old one is kept in RUN_DIR/before/",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    parser.add_argument("--round", type=int, metavar="N", help="with --print-run: of round N of the sweeps, from 0")
    parser.add_argument("--print-run", type=int, metavar="N", help="print the arguments of --compare's run N, and stop")
    parser.add_argument(
        "--add-seeds", action="store_true", help="print the jobs for the seeds that --compare's report leaves wanted"
    )
    parser.add_argument("--submitted", metavar="N", help="note for --status that array N holds --compare's runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    options = parser.parse_intermixed_args(arguments)
    if options.prepare:  # --prepare takes whatever follows it
        options.overrides += [item for item in options.prepare if "=" in item]
        options.prepare = [item for item in options.prepare if "=" not in item]
    if options.restart and not options.config:
        parser.error("--restart belongs to --config: of a comparison, remove the run directories that begin anew")
    if (options.add_seeds or options.submitted) and not options.compare:
        parser.error("--add-seeds and --submitted belong to --compare")
    return options


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    os.chdir(REPOSITORY)  # paths in configurations are relative to it
    if options.print_run is not None:
        print(*run_of_task(options).arguments, sep="\n")
    elif options.status:
        options.compare = options.status
        settings = read_compare(Path(options.compare), options.overrides)
        options.overrides = replaced(options.overrides, status.added_seeds(settings))
        settings, runs = read_comparison(options)
        status.show(settings, runs, options.gpus_per_node > 0, REPOSITORY / LOGS)
    elif options.config:
        submit(plan_run(options), options.dry_run)
    elif options.add_seeds:
        add_seeds(options)
    elif options.submitted:
        remember(options, {"compare": options.submitted})
    elif options.compare:
        compare = read_compare(Path(options.compare), options.overrides)
        if not options.dry_run:
            take_records(compare)
        numbers = submit(plan_comparison(options), options.dry_run)
        if compare.until is not None:
            text = f"the report's job adds seeds while an interval is wider, at most {compare.most_seeds} in all"
            print(f"{'# ' * options.dry_run}until {compare.until:g}: {text}")
        if not options.dry_run:
            remember(options, numbers)
    elif options.tasks:
        if len(options.prepare) != 1:
            raise UserError("--tasks: for one corpus; give --prepare one configuration")
        corpus.submit(options, options.prepare[0], lambda: task_resources(options))
    else:
        submit([prepare_job(options, options.prepare, options.overrides)], options.dry_run)
    return 0


if __name__ == "__main__":
    run_command(main)
