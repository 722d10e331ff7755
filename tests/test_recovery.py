"""The server is stopped, killed and started; agents, supervisors, sessions, nodes die: each job ends once and whole.

Every job holds a kernel lock while anything of it is alive, so two attempts alive at once are seen by the kernel; and
it notes each start where no restart can lose or double the note. Both need `SANDBOX=off`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

import config
from executor import JobIdentity, Probe, job_spec, probe_request
from local_executor import LocalExecutor
from tests.fleet import Fleet, missing_tools, read_process
from tests.ledger import replay
from tests.server import PROJECT, Server, free_port, wait_until

RUNNERS = [f"runner{number}" for number in range(1, 9)]
WAITERS = [f"waiter{number}" for number in range(1, 4)]
ADMIN = "admin"
USERS = (*RUNNERS, *WAITERS)
TIMEOUT = 60.0
SETTINGS = {
    "SUBMITS_PER_MINUTE": "10000",
    "SANDBOX": "off",  # the jobs must reach their locks
    "KILL_GRACE": "1",
    "NODE_PING_INTERVAL": "0.5",
    "NODE_PING_TIMEOUT": "3",
    "SSH_CONNECT_TIMEOUT": "3",
    "QUARANTINE_AFTER": "1000",
}
STOP_WITHIN = 5.0  # seconds, as promised

BEGIN = """
import fcntl, json, os, signal, sys, time
folder, user, job = {folder!r}, os.environ["USER_ID"], os.environ["JOB_ID"]
def note(word):
    descriptor = os.open(f"{{folder}}/notes", os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{{word}} {{job}}\\n".encode())
    os.close(descriptor)
lock = os.open(f"{{folder}}/{{user}}.lock", os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("doubled")
note("started")
"""

# A child in a session of its own that minds no SIGTERM; it holds the lock, too.
DAEMON = """
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    os._exit(0)
"""

# Prints until it is let go, but at least so many lines; all of it can be foretold from their number.
TALK = """
print("start", user, flush=True)
number = 0
while number < {least} or not os.path.exists(f"{{folder}}/{{user}}.go"):
    print(user, "line", number, flush=True)
    if number % 7 == 0:
        print(user, "error", number, file=sys.stderr, flush=True)
    number += 1
    time.sleep({pause})
with open(os.environ["RESULTS_FILE"], "w") as results:
    results.write(json.dumps({{"job": job, "lines": number}}) + "\\n")
"""


def printed(user: str, lines: int) -> tuple[str, str]:
    """What a talking job of this user prints on stdout and on stderr."""
    stdout = [f"start {user}\n", *(f"{user} line {number}\n" for number in range(lines))]
    return "".join(stdout), "".join(f"{user} error {number}\n" for number in range(0, lines, 7))


@dataclass
class Job:
    """A talking job."""

    bench: Bench
    user: str
    job_id: str

    def status(self) -> dict[str, Any]:
        """Its status."""
        return self.bench.server.status(self.job_id, self.user)

    def events(self) -> list[dict[str, Any]]:
        """Its story."""
        return self.bench.server.events(self.job_id, self.user)

    def told(self) -> list[str]:
        """The names of its events."""
        return [event["event"] for event in self.events()]

    @property
    def node(self) -> int:
        """The number of the node that has it."""
        return int(str(self.status()["node_id"]).rpartition("-")[2])

    def attempt_folder(self, attempt: int = 1) -> Path:
        """The attempt's folder on its node."""
        found = self.bench.attempt_folders(self.job_id, attempt)
        assert len(found) == 1, found
        return found[0]

    def size(self) -> int:
        """Bytes of stdout at the server."""
        path = self.bench.server.jobs_dir / self.job_id / "stdout"
        return path.stat().st_size if path.exists() else 0

    def wait_for_more(self) -> None:
        """Wait until more output has come to the server."""
        size = self.size()
        wait_until(lambda: self.size() > size, TIMEOUT, f"more than {size} bytes of {self}")

    def started(self) -> int:
        """How often it was started, by its own account."""
        return self.bench.notes()["started", self.job_id]

    def wait_until_started(self, times: int = 1) -> None:
        """Wait until it notes its start."""
        wait_until(lambda: self.started() >= times, TIMEOUT, f"start {times} of {self}")

    def is_alive(self) -> bool:
        """Whether anything of it lives, on whatever node."""
        with open(self.bench.folder / f"{self.user}.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def release(self) -> None:
        """Let it end."""
        (self.bench.folder / f"{self.user}.go").touch()

    def assert_one_end(self, state: str, attempts: int = 1) -> None:
        """Wait for its end; then what holds for every job."""
        status = self.bench.server.wait_for(self.job_id, self.user, timeout=TIMEOUT)
        events = self.events()
        story = json.dumps([status, events], indent=1)  # a list would be shown cut
        assert status["status"] == state, story
        assert status["attempt"] == attempts, story
        rows = [{**event, "from_state": event["from_status"], "to_state": event["to_status"]} for event in events]
        assert replay(rows) == [], story
        launches = Counter(event["attempt"] for event in events if event["event"] == "started")
        assert set(launches.values()) == {1}, story
        assert self.bench.notes()["doubled", self.job_id] == 0
        wait_until(lambda: not self.is_alive(), TIMEOUT, f"everything of {self} to be dead")

    def assert_completed(self, attempts: int = 1, starts: int | None = None) -> None:
        """It completes, was started as often as told, and not a byte is missing, doubled or another's."""
        server = self.bench.server
        self.assert_one_end("completed", attempts)
        assert self.started() == (attempts if starts is None else starts)
        answer = server.results(self.job_id, self.user)
        (record,) = answer["results"]
        assert record["job"] == self.job_id
        assert (answer["stdout"], answer["stderr"]) == printed(self.user, record["lines"])
        for stream, text in zip(("stdout", "stderr"), printed(self.user, record["lines"]), strict=True):
            assert (server.jobs_dir / self.job_id / stream).read_text() == text
        published = [path.name for path in server.jobs_dir.glob("results/*") if self.job_id in path.read_text()]
        assert published == [answer["result_file"]]


@dataclass
class Bench:
    """A server on nodes of a fleet, or on this machine, and the folder of its jobs' locks and notes."""

    server: Server
    fleet: Fleet | None
    folder: Path

    def submit(self, user: str, *, least: int = 0, pause: float = 0.02, daemon: bool = False, **fields: Any) -> Job:
        """Submit a talking job; it runs until it is released."""
        (self.folder / f"{user}.go").unlink(missing_ok=True)
        code = (BEGIN + (DAEMON if daemon else "") + TALK).format(folder=str(self.folder), least=least, pause=pause)
        return Job(self, user, self.server.submit(user, code, **fields))

    def talk(self, user: str, **fields: Any) -> Job:
        """A talking job whose output arrives."""
        job = self.submit(user, **fields)
        job.wait_for_more()
        return job

    def notes(self) -> Counter[tuple[str, str]]:
        """What the jobs noted: (word, job id), and how often."""
        lines = (line.split() for line in (self.folder / "notes").read_text().splitlines())
        return Counter((word, job_id) for word, job_id in lines)

    def attempt_folders(self, job_id: str, attempt: int | str = "*") -> list[Path]:
        """What the nodes keep of a job."""
        name = f"*/*/attempts/{job_id}.{attempt}"
        found = list(self.server.jobs_dir.glob(f".nodes/{name}"))
        for node in self.fleet.nodes if self.fleet is not None else []:
            found += node.home.glob(f".gpu-job-server/{name}")
        return found

    def start_again(self, *, wait_for_nodes: bool = True) -> None:
        """Start the server."""
        self.server.wait_for_nodes = wait_for_nodes
        self.server.start()

    def clear(self) -> None:
        """Whatever became of a test: the server runs, all nodes are there and idle."""
        for node in self.fleet.nodes if self.fleet is not None else []:
            assert self.fleet is not None
            self.fleet.thaw(node.number)
            self.fleet.start(node.number)
        if self.server.process is None or self.server.process.poll() is not None:
            self.start_again()
        for state in ("pending", "running"):
            for job in self.server.get(f"/api/jobs?status={state}", ADMIN).json()["jobs"]:
                self.server.cancel(job["job_id"], ADMIN)
        wait_until(self.all_idle, TIMEOUT, "all nodes to be idle")

    def all_idle(self) -> bool:
        """Whether every node is connected and has no job."""
        nodes = self.server.get("/api/nodes").json()["nodes"]
        return all(node["status"] == "online" for node in nodes)


def make_tokens(server: Server, users: Iterable[str]) -> None:
    """A token for each user and the admin, all by one process."""
    program = "import sys, token_manager as tokens; [tokens.main(['create', *word.split()]) for word in sys.argv[1:]]"
    words = [sys.executable, "-c", program, *users, f"{ADMIN} --admin"]
    done = subprocess.run(words, cwd=PROJECT, env=server.environment(), capture_output=True, text=True, check=True)
    found = re.findall(r"^Token, shown only now: (\S+)", done.stdout, re.MULTILINE)
    server.tokens.update(zip([*users, ADMIN], found, strict=True))


@contextlib.contextmanager
def bench_on(fleet: Fleet | None, users: Iterable[str] = USERS, **settings: str) -> Iterator[Bench]:
    """A server with tokens for the users."""
    with tempfile.TemporaryDirectory(prefix="gpu-job-server-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        for file in ("notes", *(f"{user}.lock" for user in users)):
            (folder / file).touch()
            (folder / file).chmod(0o666)
        server = Server({**SETTINGS, **(fleet.settings() if fleet else {}), **settings}, wait_for_nodes=False)
        make_tokens(server, users)
        with server:
            yield Bench(server, fleet, folder)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Bench]:
    """Eight slots on this machine."""
    with bench_on(None) as bench:
        yield bench


@pytest.fixture(scope="module")
def over_ssh(fleet: Fleet) -> Iterator[Bench]:
    """Eight SSH nodes."""
    with bench_on(fleet) as bench:
        yield bench


@pytest.fixture
def remote(over_ssh: Bench) -> Iterator[Bench]:
    """SSH nodes, all idle."""
    over_ssh.clear()
    yield over_ssh
    over_ssh.clear()


@pytest.fixture(params=["embedded", "over_ssh"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Either, with all nodes idle."""
    found: Bench = request.getfixturevalue(request.param)
    found.clear()
    yield found
    found.clear()


# -- the server stops and comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "kill-9"])
def test_no_job_is_lost_doubled_or_cut_by_a_restart(bench: Bench, number: signal.Signals) -> None:
    running = [bench.submit(user, least=150) for user in RUNNERS]
    for job in running:
        wait_until(job.size, TIMEOUT, f"output of {job}")
    waiting = [bench.submit(user, least=150, pause=0.005) for user in WAITERS]
    assert [job.status()["status"] for job in running + waiting] == ["running"] * 8 + ["pending"] * 3
    asked = time.monotonic()
    code = bench.server.signal(number)
    took = time.monotonic() - asked
    if number == signal.SIGTERM:
        assert code == 0, bench.server.log()[-3000:]
        assert took < STOP_WITHIN
    assert all(job.is_alive() for job in running)
    bench.start_again()
    for job in running:
        job.wait_for_more()
    for job in running + waiting:
        job.release()
    for job in running + waiting:
        job.assert_completed()
    assert all(job.told().count("adopted") == 1 for job in running)
    assert not any("adopted" in job.told() for job in waiting)


def test_killing_the_server_again_and_again_at_any_moment_loses_nothing(bench: Bench) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    jobs = [bench.submit(user) for user in RUNNERS]
    for _ in range(5):
        time.sleep(moments.uniform(0, 0.6))  # not to wait for anything: the moment is the fault
        bench.server.kill()
        bench.start_again(wait_for_nodes=False)
    for job in jobs:
        job.wait_until_started()
        job.release()
    for job in jobs:
        job.assert_completed()


@pytest.mark.parametrize("nodes", ["embedded", "over_ssh"])
def test_job_that_was_taken_while_no_node_was_there_runs_after_a_kill(nodes: str, fleet: Fleet) -> None:
    nowhere = {"GPU_NODES": '[{"host": "127.0.0.1", "port": 1}]', "SSH_KEY_FILE": str(fleet.key_file)}
    with bench_on(None, users=RUNNERS[:1], **nowhere) as bench:
        job = bench.submit(RUNNERS[0])
        bench.server.kill()
        if nodes == "over_ssh":
            bench.fleet = fleet
            bench.server.settings.update(fleet.settings())
        else:
            bench.server.settings["GPU_NODES"] = ""
        bench.server.settings["NUM_GPU_NODES"] = "1"
        bench.start_again()
        job.wait_until_started()
        job.release()
        job.assert_completed()
        assert job.told() == ["submitted", "claimed", "started", "completed"]


def test_what_ended_while_the_server_was_down_is_told_after_its_start(bench: Bench) -> None:
    ends = bench.talk(RUNNERS[0])
    overdue = bench.submit(RUNNERS[1], daemon=True, expected_time=2)  # may run for twice as long
    overdue.wait_for_more()
    bench.server.kill()
    exits = [job.attempt_folder() / "exit.json" for job in (ends, overdue)]
    assert not any(path.exists() for path in exits)
    ends.release()
    wait_until(lambda: all(path.exists() for path in exits), TIMEOUT, "both jobs to end on their nodes")
    assert not ends.is_alive()
    assert not overdue.is_alive()
    output = (overdue.attempt_folder() / "stdout").read_text()
    bench.start_again()
    ends.assert_completed()
    overdue.assert_one_end("failed")
    assert overdue.started() == 1
    answer = bench.server.results(overdue.job_id, overdue.user)
    assert answer["failure_reason"] == "timeout"
    assert "4 seconds" in answer["message"]
    assert answer["stdout"] == output == printed(overdue.user, output.count("line"))[0]


# -- parts die while the server runs -------------------------------------------------------------------------------


def pid_in(path: Path) -> int:
    """The process that a lock or an identity file of the agent names."""
    pid = int(json.loads(path.read_text())["pid"])
    assert read_process(pid) is not None
    return pid


def test_output_goes_on_when_the_agent_is_killed(bench: Bench) -> None:
    job = bench.talk(RUNNERS[0])
    lock = job.attempt_folder().parent.parent / "agent.lock"
    before, agent = lock.read_text(), pid_in(lock)
    os.kill(agent, signal.SIGKILL)
    # What the old agent had sent already is "more" too: what comes after the new one's start is the proof.
    wait_until(lambda: lock.read_text() not in ("", before), TIMEOUT, "another agent to serve")
    job.wait_for_more()
    assert pid_in(lock) != agent
    job.release()
    job.assert_completed()


def test_output_goes_on_when_the_ssh_sessions_are_killed(remote: Bench) -> None:
    jobs = [remote.talk(user) for user in RUNNERS[:2]]
    assert remote.fleet is not None
    for job in jobs:
        remote.fleet.kill_sessions(job.node)
    for job in jobs:
        job.wait_for_more()
        job.release()
    for job in jobs:
        job.assert_completed()


def test_job_whose_supervisor_is_killed_runs_once_more_elsewhere(bench: Bench) -> None:
    job = bench.talk(RUNNERS[0], daemon=True)
    first_node = job.node
    os.kill(pid_in(job.attempt_folder() / "supervisor.json"), signal.SIGKILL)
    job.wait_until_started(2)
    assert job.node != first_node
    job.release()
    job.assert_completed(attempts=2)
    (requeued,) = [event for event in job.events() if event["event"] == "requeued"]
    assert (requeued["reason"], requeued["attempt"]) == ("node_lost", 1)
    assert (requeued["from_status"], requeued["to_status"]) == ("running", "pending")
    assert "supervisor" in requeued["message"]


# -- nodes out of reach --------------------------------------------------------------------------------------------


def wait_until_away(job: Job) -> dict[str, Any]:
    """Wait until the server has noticed that the job's node is away; what the user is told then."""

    def away() -> dict[str, Any] | None:
        status = job.status()
        return status if status["node_reachable"] is False else None

    status: dict[str, Any] = wait_until(away, TIMEOUT, f"the node of {job} to be out of reach")
    assert status["status"] == "running"
    return status


def test_cancelling_while_the_node_is_away_is_done_when_it_returns(remote: Bench) -> None:
    job = remote.talk(RUNNERS[0], daemon=True)
    node = job.node
    assert remote.fleet is not None
    remote.fleet.stop(node)
    wait_until_away(job)
    answer = remote.server.cancel(job.job_id, job.user)
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] == "running"
    assert "when its node is back" in answer.json()["message"]
    assert job.is_alive()
    remote.fleet.start(node)
    job.assert_one_end("cancelled")
    assert job.started() == 1
    told = job.told()
    assert told.index("cancel_requested") < told.index("cancelled") == len(told) - 1
    assert job.events()[-1]["actor"] == f"user:{job.user}"


def test_output_goes_on_after_a_silence_of_the_network(remote: Bench) -> None:
    job = remote.talk(RUNNERS[0])
    node = job.node
    assert remote.fleet is not None
    remote.fleet.freeze(node)
    assert "out of reach" in wait_until_away(job)["message"]
    output = job.attempt_folder() / "stdout"
    wait_until(lambda: output.stat().st_size > job.size() + 100, TIMEOUT, "the job to print on")
    remote.fleet.thaw(node)
    job.wait_for_more()
    job.release()
    job.assert_completed()
    assert [word for word in job.told() if word.endswith("reachable")] == ["unreachable", "reachable"]


def test_server_stops_and_starts_while_a_node_is_silent(remote: Bench) -> None:
    job = remote.talk(RUNNERS[0])
    node = job.node
    assert remote.fleet is not None
    remote.fleet.freeze(node)
    assert remote.server.terminate() == 0
    remote.start_again(wait_for_nodes=False)
    wait_until_away(job)
    remote.fleet.thaw(node)
    job.wait_for_more()
    job.release()
    job.assert_completed()


# -- nodes away for longer than their jobs may live ----------------------------------------------------------------


@dataclass
class Lost:
    """What was done to four jobs, each on a node of its own, which then ran again elsewhere."""

    bench: Bench
    silent: Job  # its node fell silent
    gone: Job  # its node went from the network
    unheard: Job  # its node was silent already when it took the job
    unacknowledged: Job  # the server died before it heard of the start; then the node was gone
    nodes: dict[str, int]


def drain(bench: Bench, number: int, what: str) -> None:
    """Drain or resume a node."""
    url = f"{bench.server.url}/api/admin/nodes/node-{number}/{what}"
    assert requests.post(url, headers=bench.server.bearer(ADMIN), timeout=30).status_code == 200


def launch_and_die(bench: Bench, user: str) -> Job:
    """A job whose launch reaches its node while the server dies."""
    bench.server.kill()
    bench.server.settings["JOB_SERVER_FAILPOINT"] = "launch_sent"
    bench.start_again()
    del bench.server.settings["JOB_SERVER_FAILPOINT"]
    job = bench.submit(user, daemon=True)
    assert bench.server.process is not None
    assert bench.server.process.wait(TIMEOUT) == -signal.SIGKILL
    job.wait_until_started()
    return job


def number_in(folder: Path) -> int:
    """The number of the node that an attempt's folder lies on."""
    return int(folder.parent.parent.name.rpartition("-")[2])


def lose_four(closing: contextlib.ExitStack) -> Lost:
    """All four at once, because the time until an attempt must be dead is the same for all. Each node is healed."""
    fleet = closing.enter_context(Fleet(8))
    short = {"NODE_PING_TIMEOUT": "2", "NODE_LOST_AFTER": "8"}
    bench = closing.enter_context(bench_on(fleet, users=RUNNERS[:4], **short))
    unacknowledged = launch_and_die(bench, RUNNERS[0])
    nodes = {"unacknowledged": number_in(unacknowledged.attempt_folder())}
    fleet.stop(nodes["unacknowledged"])
    bench.start_again(wait_for_nodes=False)
    wait_until(
        lambda: sum(node["status"] == "online" for node in bench.server.get("/api/nodes").json()["nodes"]) == 7,
        TIMEOUT,
        "the other nodes to be connected",
    )
    silent, gone = (bench.talk(user, daemon=True) for user in RUNNERS[1:3])
    nodes.update(silent=silent.node, gone=gone.node)
    nodes["unheard"], *others = [node.number for node in fleet.nodes if node.number not in nodes.values()]
    for number in others:
        drain(bench, number, "drain")
    fleet.freeze(nodes["unheard"])
    unheard = bench.submit(RUNNERS[3], daemon=True)
    wait_until(lambda: "claimed" in unheard.told(), TIMEOUT, "the silent node to take the job")
    for number in others:
        drain(bench, number, "resume")
    fleet.freeze(nodes["silent"])
    fleet.stop(nodes["gone"])
    found = Lost(bench, silent, gone, unheard, unacknowledged, nodes)
    for name, starts in (("silent", 2), ("gone", 2), ("unheard", 1), ("unacknowledged", 2)):
        job: Job = getattr(found, name)
        job.wait_until_started(starts)
        job.release()
        fleet.thaw(nodes[name])  # what it then does must not matter any more
        fleet.start(nodes[name])
    return found


@pytest.fixture(scope="module", autouse=True)
def losing(request: pytest.FixtureRequest) -> Iterator[Future[Lost] | None]:
    """That story takes half a minute of waiting, so it goes on beside the other tests, on a fleet of its own."""
    if missing_tools() is not None or not any("lost" in item.fixturenames for item in request.session.items):  # type: ignore[attr-defined]
        yield None
        return
    with contextlib.ExitStack() as closing, ThreadPoolExecutor(1) as pool:
        yield pool.submit(lose_four, closing)


@pytest.fixture(scope="module")
def lost(losing: Future[Lost] | None) -> Lost:
    """Its outcome."""
    if losing is None:
        pytest.skip(str(missing_tools()))
    return losing.result()


def assert_ran_again(lost: Lost, name: str, *, starts: int = 2) -> None:
    """The job ran again on another node after its first attempt was dead, and ended once."""
    job: Job = getattr(lost, name)
    job.assert_completed(attempts=2, starts=starts)
    assert job.node != lost.nodes[name]
    (requeued,) = [event for event in job.events() if event["event"] == "requeued"]
    assert (requeued["reason"], requeued["node_id"]) == ("node_lost", f"node-{lost.nodes[name]}")


def test_job_of_a_node_that_is_silent_for_too_long_runs_again_elsewhere(lost: Lost) -> None:
    assert_ran_again(lost, "silent")


def test_job_of_a_node_that_is_gone_for_too_long_runs_again_elsewhere(lost: Lost) -> None:
    assert_ran_again(lost, "gone")


def test_job_claimed_by_a_node_that_had_just_fallen_silent_runs_elsewhere(lost: Lost) -> None:
    """The launch lies in the node's network buffer; when it arrives, its time is over and nothing is started."""
    assert_ran_again(lost, "unheard", starts=1)


def test_job_whose_start_was_never_acknowledged_runs_again_only_when_it_must_be_dead(lost: Lost) -> None:
    assert_ran_again(lost, "unacknowledged")


def test_node_that_was_away_for_too_long_keeps_nothing_of_what_ran_there(lost: Lost) -> None:
    lost.bench.clear()
    jobs = (lost.silent, lost.gone, lost.unheard, lost.unacknowledged)
    wait_until(
        lambda: not any(lost.bench.attempt_folders(job.job_id) for job in jobs), TIMEOUT, "the nodes to be cleaned"
    )
    assert all(job.status()["status"] == "completed" for job in jobs)


def test_a_launch_brings_its_own_lease(tmp_path: Path) -> None:
    """What pings promised to a former job on the node counts for nothing: else an attempt whose start was never
    acknowledged would live on for longer than the server believes."""
    settings = config.load(_env_file=None, jobs_dir=tmp_path, sandbox="off", kill_grace=0.5)
    executor = LocalExecutor(1, settings, "test")
    connection = executor.connect()
    try:
        probe = Probe.of(connection.request("probe", timeout=TIMEOUT, **probe_request(executor, settings)))
        connection.request("ping", lease_until=connection.node_clock() + 3600)
        spec = job_spec(JobIdentity("job", "u", "c", "p"), 600, probe, [], settings)
        until = connection.node_clock() + 1
        connection.request(
            "launch",
            b"import time; time.sleep(600)",
            timeout=TIMEOUT,
            job="job",
            attempt=1,
            not_after=until,
            lease_until=until,
            spec=spec,
        )
        deadline = time.monotonic() + 20
        records: list[dict[str, Any]] = []
        while not records and time.monotonic() < deadline:
            records = [push["record"] for push in connection.wait(1) if push["push"] == "exit"]
        if not records:
            connection.request("kill", job="job", attempt=1, reason="cancelled", grace=0)
        assert [record["reason"] for record in records] == ["lease_expired"]
    finally:
        connection.close()


# -- starts that are refused ---------------------------------------------------------------------------------------


def refusal(server: Server, **settings: str) -> str:
    """What a start with these settings says when it is refused."""
    before = dict(server.settings)
    server.settings.update(settings)
    try:
        result = server.run("main.py", code=1)
    finally:
        server.settings = before
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("main.py: ")]
    assert "Traceback" not in result.stderr
    return sentence


def test_taken_port_is_named_with_its_remedy(embedded: Bench) -> None:
    embedded.clear()
    sentence = refusal(embedded.server)
    assert f"port {embedded.server.port} is taken" in sentence
    assert f"SERVER_PORT={embedded.server.port + 1} python3 main.py" in sentence


def test_second_server_on_one_database_is_refused_and_the_first_goes_on(embedded: Bench) -> None:
    embedded.clear()
    job = embedded.talk(RUNNERS[0])
    sentence = refusal(embedded.server, SERVER_PORT=str(free_port()))
    assert str(embedded.server.folder / "database.db") in sentence
    assert f"{embedded.server.process.pid}" in sentence  # type: ignore[union-attr]
    job.wait_for_more()
    job.release()
    job.assert_completed()
    assert "adopted" not in job.told()


def test_schema_newer_than_the_code_is_refused_and_left_alone(embedded: Bench) -> None:
    embedded.clear()
    server = embedded.server
    assert server.terminate() == 0
    version = set_schema_version(server, "9999")
    try:
        sentence = refusal(server)
        assert "newer version" in sentence
        assert set_schema_version(server, "9999") == "9999"
    finally:
        set_schema_version(server, version)
    embedded.start_again()


def set_schema_version(server: Server, version: str) -> str:
    """Write down another schema version; the former one."""
    with contextlib.closing(sqlite3.connect(server.folder / "database.db")) as connection, connection:
        (former,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    return str(former)
