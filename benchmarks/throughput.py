"""No-op jobs a second by eight users over eight nodes."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from benchmarks import peers
from benchmarks.measure import OURS, Findings, Goal, Row, compare, interleaved, skipped
from benchmarks.servers import MeasuredServer, Missing, Run, User, cpu_seconds, profile
from tests.fleet import NODE_PYTHON

ORDER = 3
TITLE = "Throughput of no-op jobs"
ABOUT = """
Eight users submit a file that says `pass` to eight SSH nodes, each the next one when the results of the last are in
the answer. Beside it, on the same nodes where they use SSH: `xargs -P8 ssh` with a ControlMaster per node, and GNU
parallel over the same masters, both running `python -u -c pass`, without files, results or records; Slurm on this
machine with eight nodes, tuned for short jobs, the same command by `sbatch` from `xargs -P8`; Ray Jobs with eight
users. Each side has the processors of this machine to itself: the daemons of Slurm and Ray are stopped (SIGSTOP) in
our turns, since Ray's take a good part of a processor when idle; ours take a hundredth of one and run on in theirs.

What keeps us behind xargs: a job's own Python takes 23 ms of processor, which xargs pays too; on top of it come the
server (12 ms: HTTP, three durable commits, the results file), the supervisor (6 ms) and the agent (4 ms), against 9 ms
of xargs and its ssh. A job leaves nine to eleven files. On ext4 without a journal, as where this was measured, the
kernel looks for inodes that were not freed within the last seconds: by `perf` 32 % of the server's and 20 % of the
nodes' processor time (`recently_deleted`); on ext4 with a journal, on the same machine, the same load ran 1.3 times as
fast.
"""
USERS = 8
NOOP = f"{NODE_PYTHON} -u -c pass"


def measure(run: Run) -> Findings:
    """Jobs a second: ours without sandbox beside every peer, then ours in the sandbox."""
    findings = Findings()
    try:
        fleet = run.fleet(USERS)
    except Missing as missing:
        findings.rows.append(skipped("no-op jobs", "/s", "xargs -P8 ssh", str(missing)))
        return findings
    number = run.scaled(4, 48, 1000)
    rounds = run.scaled(1, 4, 15)
    there = peers.found() if run.peers else {}
    with contextlib.ExitStack() as things:
        server = things.enter_context(run.server({"SANDBOX": "off", **fleet.settings()}))
        load = things.enter_context(Load(server, fleet.size))
        sides: dict[str, Callable[[], float]] = {OURS: lambda: load.rate(number)}
        goals: dict[str, Goal] = {}
        names = [f"node{node + 1}" for node in range(fleet.size)]
        if there.get("OpenSSH") and there.get("xargs"):
            masters = things.enter_context(peers.Masters(fleet.ssh_config, names))
            sides["xargs -P8 ssh"] = lambda: by_xargs(masters, names, number)
            goals["xargs -P8 ssh"] = Goal(at_least=1)
            if there.get("GNU parallel"):
                sides["GNU parallel"] = lambda: by_parallel(masters, names, number)
        values = interleaved(sides, rounds=rounds, seconds=run.seconds * 3)
        before = cpu_seconds(server.pid)
        load.rate(number)
        spent = (cpu_seconds(server.pid) - before) / number * 1000
        note = f"of which the server's own processor time is {spent:.1f} ms a job"

        def shown() -> str:
            with load.running():
                return profile(server.pid, run.scaled(1, 3, 10))

        findings.rows += compare("no-op jobs", "/s", values, goals, note=note, profile=shown)
        # These two bring daemons that take processor time even when idle: each has its turns alone with ours.
        if run.peers:
            findings.rows += beside_slurm(run, load, there, number)
            findings.rows += beside_ray(run, load, there, number)
    with run.server({"SANDBOX": "auto", **fleet.settings()}) as server, Load(server, fleet.size) as load:
        values = interleaved({OURS: lambda: load.rate(number)}, rounds=rounds, seconds=run.seconds * 2)
        findings.rows += compare("no-op jobs in the sandbox", "/s", values)
    return findings


class Load:
    """Eight users with a connection each."""

    def __init__(self, server: MeasuredServer, users: int) -> None:
        self._users = [User(server, f"user{number}") for number in range(users)]
        self._requests = [user.submission(wait=True) for user in self._users]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for user in self._users:
            user.client.close()

    def rate(self, number: int) -> float:
        """Run so many jobs; how many a second."""
        left = iter(range(number))
        began = time.monotonic()
        self._run(lambda: next(left, None) is not None)
        return number / (time.monotonic() - began)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Jobs without end, while something is looked at."""
        ended = threading.Event()
        thread = threading.Thread(target=lambda: self._run(lambda: not ended.is_set()))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _run(self, more: Callable[[], bool]) -> None:
        errors: list[BaseException] = []

        def work(user: User, request: bytes) -> None:
            try:
                while more():
                    user.run(request)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(self._users, self._requests, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def by_xargs(masters: peers.Masters, names: list[str], number: int) -> float:
    """The nodes in turn, eight at a time."""
    turns = "\n".join(names[place % len(names)] for place in range(number))
    words = ["xargs", "-P8", "-I{}", *masters.words("{}"), NOOP]
    return number / seconds_of(words, turns)


def by_parallel(masters: peers.Masters, names: list[str], number: int) -> float:
    """One job slot on each node."""
    logins = ",".join(f"1/{name}" for name in names)
    words = ["parallel", "--will-cite", "--ssh", "ssh " + " ".join(masters.options), "-S", logins, "-N0", NOOP]
    return number / seconds_of(words, "\n".join(map(str, range(number))))


def seconds_of(words: list[str], lines: str, environment: Mapping[str, str] | None = None) -> float:
    """Run a command to its end; what it printed is shown when it fails."""
    began = time.monotonic()
    done = subprocess.run(
        words, input=lines + "\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words}: {done.returncode}\n{done.stdout[-2000:]}")
    return time.monotonic() - began


def beside_slurm(run: Run, load: Load, there: Mapping[str, str | None], number: int) -> list[Row]:
    """At least five times Slurm's."""
    goal = Goal(at_least=5)
    if not there["Slurm"]:
        return [skipped("no-op jobs", "/s", "Slurm", "not installed (--install-peers as root)", goal)]
    with peers.slurm(USERS) as (environment, daemons):
        few = min(number, run.scaled(8, 24, 300))

        def jobs() -> float:
            command = ["sbatch", "-Q", "-o", "/dev/null", "--wrap", "python3 -c pass"]
            began = time.monotonic()
            seconds_of(["xargs", "-P8", "-I{}", *command], "\n".join(map(str, range(few))), environment)
            while subprocess.run(["squeue", "-h"], env=environment, capture_output=True, check=True).stdout.strip():
                time.sleep(0.02)
            return few / (time.monotonic() - began)

        def ours() -> float:
            with peers.stopped(daemons):
                return load.rate(number)

        sides = {OURS: ours, "Slurm": jobs}
        values = interleaved(sides, rounds=run.scaled(1, 3, 9), seconds=run.seconds, warm_up=False)
    return compare("no-op jobs", "/s", values, {"Slurm": goal})


def beside_ray(run: Run, load: Load, there: Mapping[str, str | None], number: int) -> list[Row]:
    """At least fifty times Ray Jobs'."""
    goal = Goal(at_least=50)
    if not there["Ray Jobs"]:
        return [skipped("no-op jobs", "/s", "Ray Jobs", "not installed (--install-peers as root)", goal)]
    few = run.scaled(2, 4, 24)
    with peers.Ray("python3 -c pass") as ray:

        def ours() -> float:
            with ray.resting():
                return load.rate(number)

        sides = {OURS: ours, "Ray Jobs": lambda: few / ray.jobs(few)}
        values = interleaved(sides, rounds=run.scaled(1, 3, 5), seconds=run.seconds, warm_up=False)
    return compare("no-op jobs", "/s", values, {"Ray Jobs": goal})
