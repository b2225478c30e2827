"""A real Slurm of three nodes on this one machine: munged, slurmctld and three slurmd in a temporary folder.

It needs the Debian packages `slurm-wlm` and `munge` and the right to start them (root); nothing of systemd or cgroups.
Ports and the munge socket are its own, so that it disturbs no other Slurm. Each node offers one fake GPU (any
character device serves), so that `--gpus-per-node=1` is scheduled as on a cluster; the jobs compute on the CPU.
A requeued job waits for `cred_expire`, 121 s unless it is set; 5 is the least.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2", "n3")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
SlurmdTimeout=15
MessageTimeout=3
KillWait=5
MinJobAge=3600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-{count}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why Slurm cannot be started here, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install -y --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root, and these tests do not run as root"
    return None


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Poll `condition`; raise TimeoutError naming `what` once `seconds` have passed."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)


class Slurm:
    """The running cluster. Jobs are submitted from the repository's root with this interpreter first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{_search_path()}",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # the daemons refuse a folder that others may write
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname().split(".")[0]
        wealth = "CPUs=4 RealMemory=8000 Gres=gpu:1"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} {wealth}" for name in NODES
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                port=_free_port(),
                # A job's port follows from its number, and several Slurms may run on this host: one a test worker.
                first_job=1 + os.getpid() % 190 * 100,
                folder=self.folder,
                nodes=nodes,
                count=len(NODES),
            )
        )
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(NODES)}] Name=gpu File=/dev/null\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munge = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "seed", "log")}
        options = [f"--{name}-file={munge[name]}" for name in ("key", "seed", "log")]
        self.call("munged", "--force", f"--socket={munge['socket']}", f"--pid-file={self.folder}/munged.pid", *options)
        self.call("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        wait_for("all nodes to be idle", lambda: self.states() == ["idle"] * len(NODES), 30)

    def stop(self) -> None:
        """Cancel what runs, then end every daemon by the id in its pid file."""
        self.call("scancel", "--user", "root", "--quiet", check=False)
        with contextlib.suppress(TimeoutError):
            wait_for("the jobs to end", lambda: not self.call("squeue", "-h", check=False), 10)
        daemons = []
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
                daemons.append(psutil.Process(int((self.folder / f"{name}.pid").read_text())))
                daemons[-1].terminate()
        for late in psutil.wait_procs(daemons, 10)[1]:
            late.kill()

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power failure does: the node's daemon and every process that it started are gone at once."""
        pid = int((self.folder / f"slurmd.{node}.pid").read_text())
        steps = [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "slurmstepd" and self._node_of(process) == node
        ]
        for step in steps:
            for process in [step, *step.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _node_of(self, step: psutil.Process) -> str | None:
        """Name of the node whose step daemon this is, if it is one of this cluster."""
        for child in step.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                environment = child.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    return environment.get("SLURMD_NODENAME")
        return None

    def call(self, *command: str, check: bool = True, folder: Path = REPOSITORY) -> str:
        """Run a Slurm command in `folder`; its standard output. Raises with its standard error if it fails."""
        done = subprocess.run(command, cwd=folder, env=self.environment, text=True, capture_output=True, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def states(self) -> list[str]:
        return [line.split()[1] for line in self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()]

    def submit(self, *arguments: str) -> str:
        """`sbatch --parsable ARGUMENTS`; the job's number."""
        return self.call("sbatch", "--parsable", *arguments)

    def job(self, number: str) -> dict[str, str]:
        """The fields that `scontrol show job` prints for a job or for one task of an array (`12_3`)."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(field.partition("=")[::2] for field in shown.splitlines()[0].split() if "=" in field)

    def wait(self, number: str, seconds: float, states: tuple[str, ...] = ("COMPLETED",)) -> dict[str, str]:
        """Wait until the job is in one of `states`; raises if it ends in another, or with its output if it hangs."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")

        def reached() -> bool:
            state = self.job(number)["JobState"]
            if state in ended and state not in states:
                raise RuntimeError(f"job {number} is {state}\n{self.output(number)}")
            return state in states

        try:
            wait_for(f"job {number} to be {' or '.join(states)}", reached, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{json.dumps(self.job(number), indent=1)}\n{self.output(number)}") from None
        return self.job(number)

    def output(self, number: str) -> str:
        path = Path(self.job(number).get("StdOut", ""))
        return path.read_text() if path.is_file() else f"(no output at {path})"


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """A cluster for the time of the block; the folder, logs included, is removed when nothing failed."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a Unix socket's path must stay below 108 characters
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)
