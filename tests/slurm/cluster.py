"""A real Slurm cluster on this machine, for tests: munged, slurmctld and a few slurmd, all on loopback, without accounting.

    python tests/slurm/cluster.py COMMAND…     start one, run COMMAND on it, stop it

Each node is a set of namespaces: a host name, a /tmp and a process table of its own. So ending one process takes a whole node
away, as a power cut would. GPUs are device files that nothing drives; Slurm counts and hands them out as real ones.
Needs root on Debian or Ubuntu; `install` fetches the packages.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol"]
ROOT = Path(__file__).resolve().parents[2]

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={state}/munge.sock,cred_expire=5
SlurmUser=root
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/%n/spool
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n/slurmd.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n/slurmd.log
{tracking}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
MpiDefault=none
# nodes may claim more than this machine has
SlurmdParameters=config_overrides
# listen on loopback only
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
JobRequeue=1
# notice things soon
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=10
KillWait=3
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10
# its jobs take the place of those of `main`, which go back to the queue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE DefaultTime=10
"""

# Where cgroups (version 1) can be written the kernel enforces memory limits, as on a real cluster; else Slurm polls and kills.
CGROUPS = "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherParams=NoOverMemoryKill"
POLLING = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherParams=OverMemoryKill"
CGROUP_CONF = """\
CgroupMountpoint={state}/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
ConstrainCores=no
ConstrainDevices=no
"""
HIERARCHIES = ("memory", "freezer")  # those that this needs

# What runs as the first process of a node. At its standard place the configuration is also found by the srun inside a job,
# whose environment snakemake's plugin cleans of SLURM_CONF.
NODE = """\
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mkdir -p /etc/slurm && mount --bind "$2/etc" /etc/slurm
mount --bind "$2/$1/tmp" /tmp
for hierarchy in "$2"/cgroup/*; do
    [ -d "$hierarchy" ] && mount --bind "/sys/fs/cgroup/${hierarchy##*/}/${2##*/}" "$hierarchy"
done
slurmd -D -N "$1" &
echo $! > "$2/$1/slurmd.inner"
while :; do wait || true; sleep 0.5; done
"""


def obstacle() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root"
    if missing() and not shutil.which("apt-get"):
        return f"not installed, and there is no apt-get: {' '.join(missing())}"
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        return "this machine allows no namespaces (unshare)"
    return ""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name)]


def install() -> None:
    """Install what is missing. The packages' own daemons are not started: the cluster starts its own."""
    if not missing():
        return
    policy = Path("/usr/sbin/policy-rc.d")  # 101: no daemon is started
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, env=quiet, stdout=subprocess.DEVNULL)
    finally:
        if ours:
            policy.unlink()


# when this program ends, however it ends, so do its children
TIED = ["setpriv", "--pdeathsig", "KILL", "--"]
UNSHARE = [
    "unshare",
    "--mount",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child=KILL",
    "--mount-proc",
    "--propagation",
    "private",
    "--",
]
COUNTER = itertools.count()  # clusters of one program have ports of their own


class Cluster:
    """`with Cluster() as cluster:` starts it and, at the end, stops what it started and nothing else."""

    def __init__(self, nodes: int = 4, gpus: int = 2, cpus: int = 16, memory: int = 500_000) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="surf-slurm-", dir="/var/tmp"))  # not in /tmp: each node has its own
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.gpus, self.cpus, self.memory = gpus, cpus, memory
        self.port = 16000 + (os.getpid() + 101 * next(COUNTER)) % 1000 * 16  # slurmctld; the nodes' follow it
        self.cgroups = [Path("/sys/fs/cgroup", name, self.state.name) for name in HIERARCHIES]  # Slurm's lie below
        if not all((path.parent / "tasks").exists() and os.access(path.parent, os.W_OK) for path in self.cgroups):
            self.cgroups = []
        self.running: dict[str, subprocess.Popen] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(self.state / "etc/slurm.conf"), "HF_HUB_OFFLINE": "1"}

    # --- start and stop -----------------------------------------------------------------------------------------------

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            sock = self.state / "munge.sock"
            own = [f"--{name}-file={self.state}/munge.{name}" for name in ("key", "pid", "log", "seed")]
            self._launch("munged", ["munged", "-F", "--num-threads=2", f"--socket={sock}", *own])
            self._until(lambda: sock.exists() and self.call("munge", "-n", "-S", str(sock)).returncode == 0, "munged")
            self.start_controller()
            for node in self.nodes:
                self.boot(node)
            self._until(lambda: len(self.idle()) == len(self.nodes), "all nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.nodes, "slurmctld", "munged"]:
            if name in self.running:
                self.stop(name)
        for path in self.cgroups:
            for folder in sorted([path, *path.rglob("*/")], reverse=True):  # innermost first
                with suppress(OSError):
                    folder.rmdir()
        shutil.rmtree(self.state, ignore_errors=True)

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._launch("slurmctld", ["slurmctld", "-D"])
        self._until(lambda: self.call("scontrol", "ping").returncode == 0, "slurmctld")

    def boot(self, node: str) -> None:
        """Switch a node on."""
        self._launch(node, [*UNSHARE, "bash", "-c", NODE, "node", node, str(self.state)])

    def stop(self, name: str) -> None:
        """End a daemon; a node ends at once with all that runs on it."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def crash_slurmd(self, node: str) -> None:
        """Only the daemon dies; the node and its jobs go on. `restart_slurmd` brings it back."""
        self.call("nsenter", *self._inside(node), "kill", "-KILL", (self.state / node / "slurmd.inner").read_text().strip())

    def restart_slurmd(self, node: str) -> None:
        """Start the daemon of a node that is still there."""
        self.call("nsenter", *self._inside(node), "slurmd", "-N", node)

    # --- ask and act --------------------------------------------------------------------------------------------------

    def call(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command, Slurm's for example."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def idle(self) -> list[str]:
        """Nodes that could take a job."""
        lines = self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines()
        return [line.split()[0] for line in lines if line.split()[1] in ("idle", "mixed")]

    def jobs(self, states: str = "R") -> dict[str, tuple[str, str]]:
        """Jobs in these states, by number: {id: (comment, node)}. The comment names the rule and its wildcards."""
        lines = self.call("squeue", "-h", "--sort", "i", "-t", states, "-o", "%A|%k|%N").stdout.splitlines()
        return {number: (comment, node) for number, comment, node in (line.split("|") for line in lines)}

    def snakemake(self, folder: Path, *words: str, **options: object) -> subprocess.Popen:
        """Start snakemake in a folder, in a session of its own, with its output in `folder/output.txt`."""
        command = [*TIED, "env", "--default-signal=INT", sys.executable, "-m", "snakemake", *words]  # heeds Ctrl-C
        with open(folder / "output.txt", "ab") as output:
            return subprocess.Popen(  # type: ignore[call-overload]
                command, cwd=folder, env=self.environment, stdout=output, stderr=output, start_new_session=True, **options
            )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        (self.state / "etc").mkdir()
        (self.state / "ctld").mkdir()
        (self.state / "munge.key").write_bytes(os.urandom(1024))
        (self.state / "munge.key").chmod(0o400)
        self.state.chmod(0o755)  # mkdtemp's 700 would keep munged's socket from users
        host, lines, devices = socket.gethostname().split(".")[0], [], []
        for number in range(self.gpus):
            os.mknod(self.state / f"gpu{number}", 0o666 | 0o020000, os.makedev(195, number))
        for number, node in enumerate(self.nodes, 1):
            for folder in ("spool", "tmp"):
                (self.state / node / folder).mkdir(parents=True)
            (self.state / node / "tmp").chmod(0o1777)
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={self.port + number} CPUs={self.cpus}"
                f" RealMemory={self.memory} Gres=gpu:fake:{self.gpus}"
            )
            devices.append(f"NodeName={node} Name=gpu Type=fake File={self.state}/gpu[0-{self.gpus - 1}]")
        for path in self.cgroups:
            path.mkdir()
            (self.state / "cgroup" / path.parent.name).mkdir(parents=True)
        (self.state / "etc/cgroup.conf").write_text(CGROUP_CONF.format(state=self.state))
        tracking = CGROUPS if self.cgroups else POLLING
        text = SLURM_CONF.format(host=host, port=self.port, state=self.state, nodes="\n".join(lines), tracking=tracking)
        (self.state / "etc/slurm.conf").write_text(text)
        (self.state / "etc/gres.conf").write_text("\n".join(devices) + "\n")
        (self.state / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.nodes)}\n")

    def _launch(self, name: str, command: list[str]) -> None:
        with open(self.state / f"{name}.out", "ab") as output:
            self.running[name] = subprocess.Popen(
                [*TIED, *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _inside(self, node: str) -> list[str]:
        """Options of nsenter for a node: its first process is the only child of `unshare`."""
        pid = self.running[node].pid
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        return ["-t", first, "--mount", "--uts", "--ipc", "--pid"]

    def _until(self, ready, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "".join(f"\n== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.state.glob("*.out")))
                raise RuntimeError(f"{what}: not up within {seconds:.0f} s{logs}")
            time.sleep(0.1)


def copy_of_the_project(folder: Path) -> Path:
    """What a fresh clone would hold, in `folder`."""
    clutter = shutil.ignore_patterns(".*", "results*", "/example", "*.egg-info", "__pycache__", "*.zip")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=clutter)
    shutil.rmtree(folder / "example", ignore_errors=True)
    return folder


def main() -> None:
    """Command line."""
    if why := obstacle():
        sys.exit(f"error: {why}")
    install()
    with Cluster() as cluster:
        sys.exit(subprocess.run(sys.argv[1:], env=cluster.environment, check=False).returncode)


if __name__ == "__main__":
    main()
