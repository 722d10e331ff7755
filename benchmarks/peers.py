"""The systems beside which the server is measured: finding, installing, starting and ending them.

Each is used as its users would, with its own command line or client, tuned as far as its documentation says. Those that
are not installed are left out and the tables say so. Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RAY_ENVIRONMENT = PROJECT / ".venv-ray"
RAY_PYTHON = RAY_ENVIRONMENT / "bin" / "python"
RAY = "ray[default]==2.60.0"
SLURM_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def program(name: str) -> str | None:
    """Where a program is, also where ordinary users do not look."""
    return shutil.which(name, path=PATH)


def found() -> dict[str, str | None]:
    """Each peer and where it is; None: not installed."""
    slurm = all(program(name) for name in SLURM_DAEMONS)
    return {
        "OpenSSH": program("ssh"),
        "xargs": program("xargs"),
        "GNU parallel": program("parallel"),
        "Slurm": program("slurmctld") if slurm and os.geteuid() == 0 else None,
        "Ray Jobs": str(RAY_PYTHON) if RAY_PYTHON.exists() and program("unshare") and os.geteuid() == 0 else None,
        "huey": "its package" if find_spec("huey") else None,
    }


def install() -> int:
    """Install what is missing: packages of the system as root, huey here, Ray into an environment of its own."""
    missing = [name for name, where in found().items() if where is None]
    packages = {"GNU parallel": ["parallel"], "Slurm": ["munge", "slurmctld", "slurmd", "slurm-client"]}
    wanted = [package for name in missing for package in packages.get(name, [])]
    commands: list[list[str]] = []
    if wanted and os.geteuid() == 0 and program("apt-get"):
        commands += [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]]
        commands[-1] += wanted
    elif wanted:
        print(f"As root on Debian or Ubuntu: apt-get install {' '.join(wanted)}")
    if "huey" in missing:
        commands.append([sys.executable, "-m", "pip", "install", "-r", str(PROJECT / "requirements-bench.txt")])
    if "Ray Jobs" in missing:
        commands += [[sys.executable, "-m", "venv", str(RAY_ENVIRONMENT)], [str(RAY_PYTHON), "-m", "pip"]]
        commands[-1] += ["install", "--quiet", RAY]
    for command in commands:
        print("+", " ".join(command), flush=True)
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process we started, and the group it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break


@contextlib.contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Processes that take no processor time for a while, as if they were not there."""
    held = list(pids)
    for pid in held:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# -- OpenSSH -------------------------------------------------------------------------------------------------------


class Masters:
    """One ControlMaster per node; `words(node)` begins a command that goes through it."""

    def __init__(self, config: Path, nodes: Sequence[str]) -> None:
        self._config = config
        self._nodes = nodes
        self._folder = tempfile.TemporaryDirectory(prefix="cm-")
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def options(self) -> list[str]:
        """ssh's options: the fleet's configuration and the masters' sockets."""
        return ["-F", str(self._config), "-o", f"ControlPath={self._folder.name}/%n"]

    def words(self, node: str) -> list[str]:
        """`ssh …` up to the remote command."""
        return ["ssh", "-n", *self.options, node]

    def __enter__(self) -> Masters:
        for node in self._nodes:
            words = ["ssh", "-n", "-N", *self.options, "-o", "ControlMaster=yes", node]
            self._running.append(subprocess.Popen(words, start_new_session=True))
        deadline = time.monotonic() + 20
        for node in self._nodes:
            while not Path(self._folder.name, node).exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no connection to {node}")
                time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            end(process)
        self._folder.cleanup()


# -- Slurm ---------------------------------------------------------------------------------------------------------


def _port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


SLURM_CONF = """\
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=5
MinJobAge=600
MailProg=/bin/true
{nodes}
PartitionName=gpu Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@contextlib.contextmanager
def slurm(nodes: int) -> Iterator[tuple[dict[str, str], list[int]]]:
    """A Slurm of so many nodes of one CPU on this machine, tuned for short jobs.

    The environment for its commands, and the pids of its daemons.
    """
    name = tempfile.mkdtemp(prefix="slurm-bench-")
    folder = Path(name)
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}

    def start(*words: str) -> None:
        log = open(folder / f"{words[0]}.out", "ab")  # noqa: SIM115 - the child's
        running.append(
            subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
        )
        log.close()

    try:
        for inner in ("munge", "state", *(f"spool-n{number + 1}" for number in range(nodes))):
            (folder / inner).mkdir(mode=0o755)
        folder.chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        lines = [
            f"NodeName=n{number + 1} NodeAddr=127.0.0.1 Port={_port()} CPUs=1 RealMemory=1000 State=UNKNOWN"
            for number in range(nodes)
        ]
        text = SLURM_CONF.format(
            host=socket.gethostname(), port=_port(), folder=folder, nodes="\n".join(lines), count=nodes
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        munge = [f"--{what}-file={folder}/munge/{what}" for what in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge/sock", *munge)
        deadline = time.monotonic() + 60
        while not (folder / "munge" / "sock").exists():
            if time.monotonic() > deadline:
                raise RuntimeError("munged did not start")
            time.sleep(0.05)
        start("slurmctld", "-D", "-i")
        for number in range(nodes):
            start("slurmd", "-D", "-N", f"n{number + 1}")
        while True:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=environment, capture_output=True, text=True
            )
            if len(done.stdout.split()) == nodes:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm's nodes did not come up: {done.stdout} {done.stderr}")
            time.sleep(0.2)
        yield environment, [process.pid for process in running]
    finally:
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# -- Ray -----------------------------------------------------------------------------------------------------------

# Runs inside a network namespace that has only loopback; told how many jobs on stdin, it answers with seconds.
RAY_DRIVER = """
import sys, time, threading
from ray.job_submission import JobSubmissionClient, JobStatus
client = JobSubmissionClient("http://127.0.0.1:8265")
def job():
    one = client.submit_job(entrypoint=sys.argv[1])
    while client.get_job_status(one) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
        time.sleep(0.02)
    assert client.get_job_status(one) == JobStatus.SUCCEEDED
print("ready", flush=True)
for line in sys.stdin:
    left = [None] * int(line)
    def user():
        while left:
            try:
                left.pop()
            except IndexError:
                return
            job()
    began = time.monotonic()
    users = [threading.Thread(target=user) for _ in range(8)]
    for one in users: one.start()
    for one in users: one.join()
    print(time.monotonic() - began, flush=True)
"""


class Ray:
    """A Ray head with eight CPUs; `jobs(n)` gives the seconds that n no-op jobs by eight users take."""

    def __init__(self, command: str) -> None:
        script = (
            "ip link set lo up && "
            f"{RAY_ENVIRONMENT}/bin/ray start --head --block --num-cpus 8 --node-ip-address 127.0.0.1 "
            '--include-dashboard true --disable-usage-stats --temp-dir "$1" >"$1/head.log" 2>&1 & '
            "ip link set lo up; "
            f"until {RAY_PYTHON} -c 'import socket; socket.create_connection((\"127.0.0.1\", 8265), 1)' 2>/dev/null; "
            f'do sleep 0.5; done; exec {RAY_PYTHON} -c "$2" "$3"'
        )
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' paths must be short
        self._process = subprocess.Popen(
            # The namespaces end with the first process in them, and everything inside with it.
            [
                *("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", script, "sh", self._folder, RAY_DRIVER, command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            if self._answer() != "ready":
                raise RuntimeError("Ray did not start")
        except BaseException:
            self.close()
            raise

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def jobs(self, number: int) -> float:
        """Seconds for so many."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def resting(self) -> contextlib.AbstractContextManager[None]:
        """While others are measured: even idle its daemons take a good part of a processor."""
        first = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0]
        space = os.readlink(f"/proc/{first}/ns/pid")
        inside = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == space:
                    inside.append(int(pid))
        return stopped(inside)

    def close(self) -> None:
        """End everything in its namespaces."""
        end(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
