"""A real SLURM on this one host: munged, slurmctld, and a slurmd for each of two nodes.

No systemd, no cgroups, no accounting; everything in one folder, on ports of its own. Partitions:
``debug`` (default), ``low`` (its jobs are preempted and requeued) and ``high`` (preempts ``low``).
Root only: slurmd then starts jobs without a setuid helper, and node names go into /etc/hosts.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.spawn import free_port

NODES = 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
_SBIN = "/usr/sbin:/sbin"
_HOSTS = Path("/etc/hosts")


def unavailable() -> str:
    """Say why a SLURM cannot be started here; "" if it can."""
    missing = [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:{_SBIN}")]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/install installs them)"
    if os.getuid() != 0:
        return "needs root, to run SLURM's daemons"
    if not os.access(_HOSTS, os.W_OK):
        return f"{_HOSTS} is not writable, so the nodes cannot have names"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        return "unshare --uts is not allowed here, so the nodes cannot have names of their own"
    return ""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.env = os.environ | {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
        }
        self._mark = f"# {folder}"

    # -- daemons -----------------------------------------------------------------------------

    def start(self) -> None:
        self._configure()
        text = _HOSTS.read_text()
        for i in range(1, NODES + 1):
            text += f"127.0.0.{10 + i} node{i} {self._mark}\n"
        _HOSTS.write_text(text)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        names = {"socket": "sock", "key-file": "key", "log-file": "log", "pid-file": "pid"}
        names["seed-file"] = "seed"
        options = [f"--{option}={self.folder}/munge.{end}" for option, end in names.items()]
        self.call("munged", "--force", *options)
        self.call("slurmctld", "-i", "-f", str(self.conf))
        self._until(self._answers, "slurmctld is up")
        for i in range(1, NODES + 1):
            (self.folder / f"spool.node{i}").mkdir()
            own_name = f'hostname node{i} && exec slurmd -N node{i} -f "{self.conf}"'
            self.call("unshare", "--uts", "sh", "-c", own_name)
        self._until(self._idle, "nodes are idle")

    def stop(self) -> None:
        """End the jobs, then the daemons, then what jobs left behind; by process id."""
        self.call("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.3)
        for name in (*(f"slurmd.node{i}" for i in range(1, NODES + 1)), "slurmctld", "munge"):
            file = self.folder / f"{name}.pid"
            if file.exists():
                _end(int(file.read_text()))
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        lines = _HOSTS.read_text().splitlines(keepends=True)
        _HOSTS.write_text("".join(line for line in lines if self._mark not in line))

    def processes(self) -> list[int]:
        """Every process of this SLURM and its jobs, also those that it has lost sight of."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.conf}".encode() in variables:
                found.append(int(entry.parent.name))
        return found

    def _configure(self) -> None:
        version = re.search(r"(\d+)\.(\d+)", self.call("slurmd", "-V"))
        assert version
        modern = (int(version[1]), int(version[2])) >= (23, 2)
        warn = "PreemptParameters=send_user_signal"
        warn = warn if modern else "SlurmctldParameters=preempt_send_user_signal"
        host = os.uname().nodename.partition(".")[0]
        here = self.folder
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "MailProg=/bin/true",
            f"StateSaveLocation={here}/state",
            f"SlurmdSpoolDir={here}/spool.%n",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmdPidFile={here}/slurmd.%n.pid",
            f"SlurmctldLogFile={here}/slurmctld.log",
            f"SlurmdLogFile={here}/slurmd.%n.log",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            # a requeued job waits until its old credentials expire: 120 s, unless told otherwise
            f"AuthInfo=socket={here}/munge.sock,cred_expire=5",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "CommunicationParameters=NoCtldInAddrAny",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "KillWait=5",
            "MinJobAge=600",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            warn,
        ]
        for i in range(1, NODES + 1):  # names differ: one host may not appear twice
            lines.append(
                f"NodeName=node{i} NodeHostname=node{i} NodeAddr=127.0.0.1 Port={free_port()} "
                "CPUs=8 RealMemory=64000 State=UNKNOWN"
            )
        for name, tier, mode in (
            ("debug", 5, "OFF Default=YES"),
            ("low", 1, "REQUEUE GraceTime=60"),
            ("high", 9, "OFF"),
        ):
            lines.append(
                f"PartitionName={name} Nodes=ALL DefaultTime=10 PriorityTier={tier} "
                f"PreemptMode={mode} State=UP"
            )
        self.conf.write_text("\n".join(lines) + "\n")
        word = "CgroupPlugin=disabled" if modern else "CgroupAutomount=no"
        (here / "cgroup.conf").write_text(word + "\n")
        (here / "state").mkdir()

    def _answers(self) -> bool:
        return "is UP" in self.call("scontrol", "ping", check=False)

    def _idle(self) -> bool:
        states = self.call("sinfo", "-h", "-N", "-p", "debug", "-o", "%t", check=False).split()
        return states == ["idle"] * NODES

    def _until(self, true: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = [p.read_text()[-2000:] for p in sorted(self.folder.glob("*.log"))]
                raise AssertionError("\n".join([f"not in {seconds:.0f} s: {what}", *logs]))
            time.sleep(0.2)

    # -- jobs --------------------------------------------------------------------------------

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        text = self.call("scontrol", "show", "job", "-o", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of these states, or else has ended; return its facts."""
        deadline = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in (states or ENDED):
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:.0f} s job {number} is {found}")
            time.sleep(0.3)
        return found


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            if not Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie has none
                return
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return
