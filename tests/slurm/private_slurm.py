"""A private Slurm for tests: slurmctld and two nodes on this machine, the first with two GPUs that are not there.

    python tests/slurm/private_slurm.py     runs one until Ctrl-C

Keys, sockets, state and logs lie in one folder, and every port was free and listens on the loopback alone, so
that several can run side by side, as root or as anybody. Neither systemd nor cgroups are needed. In Debian:
apt-get install --no-install-recommends slurmctld slurmd slurm-client munge. Written for Slurm 22.05.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DAEMON_FOLDERS = "/usr/sbin:/sbin"  # of Debian; not on everybody's PATH
SOCKET_FOLDER_LENGTH = 70  # above it a Unix socket's path gets too long
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# A requeued job waits a second longer than cred_expire; for less than 5, Slurm takes 120. The files of the GPUs must
# be character devices. A job of the partition urgent takes the first node from those of main, after 30 s of grace.
SLURM_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PropagateResourceLimits=NONE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=64 RealMemory=256000 Gres=gpu:2
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=64 RealMemory=256000
PartitionName=main Nodes=first Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=first PriorityTier=10 PreemptMode=OFF
PartitionName=both Nodes=first,second
"""
GRES_CONF = "AutoDetect=off\nNodeName=first Name=gpu File={folder}/gpu[0-1]\n"
NODES = ("first", "second")


class PrivateSlurm:
    """One cluster: `start` returns when it is ready for jobs, `stop` ends it and whatever runs in it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.host = socket.gethostname().split(".")[0]
        self.daemons: dict[str, subprocess.Popen] = {}
        names = (name for name in os.environ if not name.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE")))
        self.environment = {name: os.environ[name] for name in names}
        self.environment["PATH"] += f":{DAEMON_FOLDERS}"
        # for the jobs; what they leave in TMPDIR when they are killed goes with the rest
        self.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}

    def is_installed(self) -> bool:
        programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
        return all(shutil.which(program, path=self.environment["PATH"]) for program in programs)

    def start(self) -> None:
        self.write_files()
        self.start_daemon("munged", "--foreground", "--force", "--origin=127.0.0.1", *self.munge_files())
        wait_for((self.folder / "munge.socket").exists)
        self.start_daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(self.is_idle)

    def stop(self) -> None:
        for name in reversed(list(self.daemons)):
            self.stop_daemon(name)
        wait_for(lambda: not self.kill_jobs())  # one of them may just be starting another
        shutil.rmtree(self.folder)

    def write_files(self) -> None:
        assert len(str(self.folder)) <= SOCKET_FOLDER_LENGTH, f"{self.folder} is too long for sockets: set TMPDIR"
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        for number in range(2):
            (self.folder / f"gpu{number}").symlink_to(os.devnull)
        slurmctld_port, first_port, second_port = free_ports(3)
        values = {"folder": self.folder, "host": self.host, "user": self.run("id", "-un")}
        values |= {"slurmctld_port": slurmctld_port, "first_port": first_port, "second_port": second_port}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**values))
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def munge_files(self) -> list[str]:
        names = {"key-file": "key", "seed-file": "seed", "socket": "socket", "pid-file": "pid"}
        return [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]

    # daemons: children in sessions of their own, or else Ctrl-C would end them before their jobs

    def start_node(self, node: str) -> None:
        self.start_daemon(node, "-D", "-N", node, program="slurmd")

    def start_daemon(self, name: str, *flags: str, program: str | None = None) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program or name, *flags], env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def stop_daemon(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def kill_jobs(self) -> int:
        """Kill all processes of the jobs; how many there were. They are known by their environment: for want of
        cgroups, Slurm itself loses those whose parent has ended."""
        mine, killed = f"SLURM_CONF={self.folder}/slurm.conf".encode(), 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone, or somebody else's
                environment = (process / "environ").read_bytes()
                is_job = b"\0SLURM_JOB_ID=" in environment or (process / "comm").read_text() == "slurmstepd\n"
                if is_job and mine in environment.split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    killed += 1
        return killed

    def is_idle(self) -> bool:
        dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
        if dead:
            raise RuntimeError(f"{dead[0]} ended: {(self.folder / f'{dead[0]}.out').read_text()[-2000:]}")
        with suppress(subprocess.CalledProcessError):  # slurmctld does not answer yet
            return self.run("sinfo", "--noheader", "--partition=both", "--format=%t") == "idle"
        return False

    # jobs

    def run(self, *words, **environment: str) -> str:
        """The output of a command that is run in the project's folder. Raises CalledProcessError."""
        command, variables = [str(word) for word in words], self.environment | environment
        return subprocess.run(
            command, env=variables, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job: JobState, Restarts, ExitCode and so on."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def restarts(self, job: str) -> int:
        return int(self.show(job)["Restarts"])

    def end_of(self, job: str) -> str:
        """Wait until the job has ended; its final state."""
        wait_for(lambda: self.show(job)["JobState"] in ENDS)
        return self.show(job)["JobState"]

    def kill_node(self) -> None:
        """What a power cut does to the first node and all jobs. slurmctld is told what it would notice after
        SlurmdTimeout; the node comes back."""
        slurmd = self.daemons.pop("first")
        slurmd.kill()
        slurmd.wait()
        self.kill_jobs()
        self.run("scontrol", "update", "NodeName=first", "State=DOWN", "Reason=dead")
        self.start_node("first")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Poll until the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited more than {seconds} s")
        time.sleep(0.1)


if __name__ == "__main__":
    slurm = PrivateSlurm()
    try:
        slurm.start()
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        slurm.stop()
