"""Links that go down, drop packets, come back and are slow: no job is lost, doubled or mixed up.

The nodes are in network namespaces of their own (`tests/netns.py`), so a cut is what it is in life: packets vanish and
nobody is told. Every job holds a kernel lock while anything of it is alive; a second launch would find it taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fleet import Process, is_alive, read_process, send
from tests.ledger import expected_stdout, replay
from tests.netns import NAMESPACES, NetnsFleet, why_not
from tests.server import Server, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

USER, ADMIN = "alice", "root"
SETTINGS = {
    "SUBMITS_PER_MINUTE": "10000",
    "MAX_ACTIVE_JOBS": "16",
    "SANDBOX": "off",  # the jobs must reach the locks
    "KILL_GRACE": "1",
    "NODE_PING_INTERVAL": "0.5",
    "NODE_PING_TIMEOUT": "2",
    "SSH_CONNECT_TIMEOUT": "3",
    "NODE_LOST_AFTER": "60",
}
TIMEOUT = 60.0
SLOW, TOO_SLOW = 250_000, 10_000  # bytes a second

# Every job begins with this. A process that the job leaves behind keeps the lock, too.
BEGIN = """
import fcntl, hashlib, json, os, sys, time
folder, job = {folder!r}, os.environ["JOB_ID"]
lock = os.open(f"{{folder}}/{{job}}.lock", os.O_RDWR | os.O_CREAT, 0o666)
if os.fstat(lock).st_uid == os.getuid():
    os.fchmod(lock, 0o666)
def write(name, text):
    descriptor = os.open(f"{{folder}}/{{name}}", os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, (text + "\\n").encode())
    os.close(descriptor)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    write("violations", f"two launches of {{job}} alive at once")
def released():
    return os.path.exists(f"{{folder}}/{{job}}.go")
def results(**record):
    with open(os.environ["RESULTS_FILE"], "a") as file:
        file.write(json.dumps(record) + "\\n")
"""

# Prints one line after the other, each different, until it is released.
TALKER = """
write("starts", job)
number = 0
while not released():
    print(hashlib.sha256(f"{seed}-{{number}}".encode()).hexdigest(), flush=True)
    number += 1
    time.sleep(0.005)
results(lines=number)
"""

# Minds no SIGTERM, and its child is a session of its own that keeps the lock. Each attempt prints another word.
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.set_inheritable(lock, True)
child = os.fork()
if child == 0:
    os.setsid()
    time.sleep(600)
    os._exit(0)
word = os.urandom(8).hex()
write("starts", f"{{job}} {{word}} {{os.getpid()}} {{child}}")
number = 0
while not released():
    print(word, number, flush=True)
    number += 1
    time.sleep(0.005)
results(word=word, lines=number)
"""

LARGE_RESULTS = """
write("starts", job)
print("held", flush=True)
while not released():
    time.sleep(0.01)
for number in range({lines}):
    results(number=number, text=hashlib.sha256(b"%d" % number).hexdigest() * {repeats})
"""

LARGE_CODE = """
write("starts", job)
with open(__file__, "rb") as file:
    results(code=hashlib.sha256(file.read()).hexdigest())
"""


@dataclass
class Bench:
    """A server on some nodes of the fleet, and the folder in which its jobs keep their locks."""

    server: Server
    fleet: NetnsFleet
    numbers: tuple[int, ...]
    folder: Path

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """`wait_until`; in vain, it shows what server and agents say."""
        try:
            return wait_until(condition, TIMEOUT, what)
        except AssertionError:
            print(f"--- server\n{self.server.log()[-6000:]}")
            for number in self.numbers:
                for path in self.fleet.node(number).home.glob(".gpu-job-server/*/*/agent.log"):
                    print(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}")
                    for attempt in path.parent.glob("attempts/*"):
                        print(f"{attempt}: {sorted(entry.name for entry in attempt.iterdir())}")
            raise

    def code(self, text: str, **words: Any) -> str:
        """A job's code."""
        return (BEGIN + text).format(folder=str(self.folder), **words)

    def talk(self, seed: int) -> Talk:
        """A talking job that is being followed."""
        job_id = self.server.submit(USER, self.code(TALKER, seed=seed))
        talk = Talk(self, job_id, seed)
        talk.wait_for_more()
        return talk

    def node_of(self, job_id: str) -> int:
        """The number in the fleet of the node that has the job."""
        node_id = self.server.status(job_id, USER)["node_id"]
        return self.numbers[int(node_id.removeprefix("node-")) - 1]

    def attempts(self, number: int, job_id: str) -> list[Path]:
        """What the node keeps of the job."""
        return list(self.fleet.node(number).home.glob(f".gpu-job-server/*/*/attempts/{job_id}.*"))

    def away(self, job_id: str) -> dict[str, Any]:
        """Wait until the server has noticed that the job's node is out of reach; what users are told then."""

        def unreachable() -> dict[str, Any] | None:
            status = self.server.status(job_id, USER)
            return status if status["status"] != "pending" and status["node_reachable"] is not True else None

        status: dict[str, Any] = self.wait(unreachable, "the node to be out of reach")
        assert status["status"] == "running"
        assert status["node_reachable"] is False
        assert "out of reach" in status["message"]
        return status

    def back(self, job_id: str) -> None:
        """Wait until the job's node is in reach again."""
        self.wait(lambda: self.server.status(job_id, USER)["node_reachable"], "the node to be back")

    def release(self, job_id: str) -> None:
        """Let the job end."""
        (self.folder / f"{job_id}.go").touch()

    def starts(self, job_id: str) -> list[list[str]]:
        """What each launch of the job wrote down of itself."""
        lines = (line.split() for line in (self.folder / "starts").read_text().splitlines())
        return [words[1:] for words in lines if words[0] == job_id]

    def told(self, job_id: str) -> list[str]:
        """The names of the job's events."""
        return [event["event"] for event in self.server.events(job_id, USER)]

    def stdout(self, job_id: str) -> Path:
        """The output so far, at the server."""
        return self.server.jobs_dir / job_id / "stdout"

    def processes(self, job_id: str, launch: int) -> list[Process]:
        """Those that a stubborn job's launch wrote down; all alive."""
        found = [read_process(int(pid)) for pid in self.starts(job_id)[launch][1:]]
        processes = [process for process in found if process is not None and is_alive(process)]
        assert len(processes) == 2
        return processes

    def ran_again(self, job_id: str, lost: int, processes: list[Process]) -> None:
        """Wait until another node runs the stubborn job; then the lost one comes back."""
        self.wait(lambda: len(self.starts(job_id)) == 2, "a second launch")
        assert not any(map(is_alive, processes))
        assert self.node_of(job_id) != lost
        assert self.attempts(lost, job_id)  # nobody could clear up there yet
        self.release(job_id)
        self.server.wait_for(job_id, USER, timeout=TIMEOUT)
        self.fleet.heal(lost)
        (record,) = self.completed(job_id, attempts=2)  # waits until the lost node is cleaned up, too
        word = self.starts(job_id)[1][0]
        assert record["word"] == word
        lines = "".join(f"{word} {number}\n" for number in range(record["lines"]))
        assert self.stdout(job_id).read_text() == lines
        assert "node_lost" in {event["reason"] for event in self.server.events(job_id, USER)}
        self.wait(self.server._all_connected, "all nodes to be connected")
        self.gets_honest_work(lost)

    def drained(self, number: int, drained: bool) -> None:
        """Drain the node with this number in the fleet, or resume it."""
        node_id = f"node-{self.numbers.index(number) + 1}"
        url = f"{self.server.url}/api/admin/nodes/{node_id}/{'drain' if drained else 'resume'}"
        self.server.token(ADMIN, admin=True)
        assert requests.post(url, headers=self.server.bearer(ADMIN), timeout=30).status_code == 200

    def gets_honest_work(self, number: int) -> None:
        """The node that was lost is fit for work again."""
        for other in self.numbers:
            if other != number:
                self.drained(other, True)
        job_id = self.server.submit(USER, "print('honest')")
        assert self.server.wait_for(job_id, USER, timeout=TIMEOUT)["status"] == "completed"
        assert self.node_of(job_id) == number

    def completed(self, job_id: str, *, attempts: int = 1, launches: int | None = None) -> list[dict[str, Any]]:
        """Wait for the job's end; the promises that hold for every job, then its result records."""
        status = self.server.wait_for(job_id, USER, timeout=TIMEOUT)
        assert status["status"] == "completed", status
        with contextlib.closing(sqlite3.connect(f"file:{self.server.folder}/database.db?mode=ro", uri=True)) as found:
            found.row_factory = sqlite3.Row
            row = found.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
            events = found.execute("SELECT * FROM job_events WHERE job_seq = ? ORDER BY id", (row["seq"],)).fetchall()
        assert replay(events) == []
        assert row["attempt"] == attempts
        assert len(self.starts(job_id)) == (attempts if launches is None else launches)
        assert (self.folder / "violations").read_text() == ""
        self.wait(lambda: not any(self.attempts(number, job_id) for number in self.numbers), "the nodes to forget")
        content = (self.server.jobs_dir / "results" / row["result_file"]).read_text()
        return [json.loads(line) for line in content.splitlines()]


@dataclass
class Talk:
    """A talking job."""

    bench: Bench
    job_id: str
    seed: int

    @property
    def node(self) -> int:
        """The node that has it."""
        return self.bench.node_of(self.job_id)

    def size(self) -> int:
        """Bytes of output at the server."""
        path = self.bench.stdout(self.job_id)
        return path.stat().st_size if path.exists() else 0

    def wait_for_more(self, *, than: int | None = None) -> None:
        """Wait until there is more output at the server."""
        size = self.size() if than is None else than
        self.bench.wait(lambda: self.size() > size, f"more output than {size} bytes")

    def wait_for_more_on(self, node: int) -> None:
        """Wait until the job has printed more than the server has."""
        (attempt,) = self.bench.attempts(node, self.job_id)
        self.bench.wait(lambda: (attempt / "stdout").stat().st_size > self.size() + 1000, "the job to print on")

    def completed(self, *, attempts: int = 1) -> None:
        """Release it: it completes, and the server has what it printed, byte for byte."""
        self.bench.release(self.job_id)
        (record,) = self.bench.completed(self.job_id, attempts=attempts)
        assert record["lines"] > 1
        assert self.bench.stdout(self.job_id).read_bytes() == expected_stdout(self.seed, record["lines"])


@pytest.fixture(scope="module")
def network() -> Iterator[NetnsFleet]:
    """Nine nodes, of which number 6 is behind the jump host."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with NetnsFleet(12, jump=True, behind_jump=[6]) as fleet:
        yield fleet


@contextlib.contextmanager
def bench_on(fleet: NetnsFleet, *numbers: int, **settings: str) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="network-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        for file in ("starts", "violations"):
            (folder / file).touch()
            (folder / file).chmod(0o666)
        with Server({**SETTINGS, **fleet.settings(*numbers), **settings}) as server:
            server.token(USER)
            yield Bench(server, fleet, numbers, folder)


@pytest.fixture(scope="module")
def stories(network: NetnsFleet, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """What mostly waits is done at the same time: each story has a server and nodes of its own, by its test's name."""
    chosen = {item.name for item in request.session.items}
    with ThreadPoolExecutor(len(STORIES)) as pool:
        yield {name: pool.submit(tell, network) for name, tell in STORIES.items() if name in chosen}


@pytest.fixture
def story(stories: dict[str, Future[str]], request: pytest.FixtureRequest) -> Callable[[], str]:
    """What the story of this test measured; fails as it failed."""
    return stories[request.node.name].result


@pytest.fixture(scope="module")
def three_nodes(network: NetnsFleet, stories: dict[str, Future[str]]) -> Iterator[Bench]:
    with bench_on(network, 1, 2, 3) as bench:
        yield bench


@pytest.fixture
def bench(three_nodes: Bench) -> Iterator[Bench]:
    """The server on three nodes, all connected; every link is whole again afterwards."""
    three_nodes.wait(three_nodes.server._all_connected, "all nodes to be connected")
    yield three_nodes
    for number in three_nodes.numbers:
        three_nodes.fleet.heal(number)
        three_nodes.fleet.start(number)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure, past pytest's capture."""

    def out(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", flush=True)

    return out


def the_agent(fleet: NetnsFleet, number: int) -> Process:
    """The node's agent that serves this server: its pid is in its lock."""
    (lock,) = fleet.node(number).home.glob(".gpu-job-server/*/*/agent.lock")
    process = read_process(json.loads(lock.read_text())["pid"])
    assert process is not None
    return process


def test_a_fleet_in_namespaces_leaves_nothing_behind_after_a_failure(network: NetnsFleet) -> None:
    def here() -> tuple[str, list[str], set[str]]:
        ours = {path.name for path in NAMESPACES.glob(f"gpuq-{os.getpid()}-*")}
        return os.readlink("/proc/thread-self/ns/net"), os.listdir("/sys/class/net"), ours

    servers: list[Process | None] = []

    def fail(fleet: NetnsFleet) -> None:
        with fleet:
            assert here()[0] != before[0]
            assert here()[2] > before[2]
            servers.extend(read_process(node.pid or 0) for node in fleet._all())
            raise ZeroDivisionError

    before = here()
    with pytest.raises(ZeroDivisionError):
        fail(NetnsFleet(1, jump=True))
    assert here() == before
    assert len(servers) == 2
    assert not any(server is None or is_alive(server) for server in servers)


# ---- The link is cut and comes back --------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 8.0])
def test_output_goes_on_where_it_stopped_when_a_cut_link_is_back(
    bench: Bench, seconds: float, say: Callable[[str], None]
) -> None:
    talk = bench.talk(seed=int(seconds))
    node = talk.node
    bench.fleet.cut(node)
    cut_at = time.monotonic()
    if seconds > float(SETTINGS["NODE_PING_TIMEOUT"]):
        bench.away(talk.job_id)
    talk.wait_for_more_on(node)
    time.sleep(max(0.0, cut_at + seconds - time.monotonic()))  # the fault's own length
    size = talk.size()
    assert bench.fleet.drops(node) > 0
    bench.fleet.heal(node)
    healed_at = time.monotonic()
    talk.wait_for_more(than=size)
    say(f"cut for {seconds:g} s: output flows {time.monotonic() - healed_at:.2f} s after the cable is back")
    talk.completed()
    told = [event for event in bench.told(talk.job_id) if event.endswith("reachable")]
    assert told == (["unreachable", "reachable"] if seconds == 8 else told[:2])


def test_a_job_that_ends_while_its_link_is_cut_completes_when_it_is_back(bench: Bench) -> None:
    talk = bench.talk(seed=20)
    node = talk.node
    (attempt,) = bench.attempts(node, talk.job_id)
    bench.fleet.cut(node)
    bench.release(talk.job_id)
    bench.wait((attempt / "exit.json").exists, "the job to end on its node")
    bench.away(talk.job_id)
    assert (attempt / "exit.json").exists()
    bench.fleet.heal(node)
    talk.completed()
    assert bench.told(talk.job_id).count("unreachable") == bench.told(talk.job_id).count("reachable") == 1


def test_a_link_cut_while_large_results_are_fetched_costs_nothing_but_time(bench: Bench) -> None:
    lines, repeats = 240, 2000  # 30 MB
    job_id = bench.server.submit(USER, bench.code(LARGE_RESULTS, lines=lines, repeats=repeats))
    bench.server.wait_for_output(job_id, USER, "held", timeout=TIMEOUT)
    node = bench.node_of(job_id)
    bench.fleet.cut_after(node, 10_000_000)
    bench.release(job_id)
    bench.away(job_id)
    assert bench.fleet.drops(node) > 0
    (attempt,) = bench.attempts(node, job_id)
    assert (attempt / "exit.json").exists()
    bench.fleet.heal(node)
    records = bench.completed(job_id)
    assert records == [
        {"number": number, "text": hashlib.sha256(b"%d" % number).hexdigest() * repeats} for number in range(lines)
    ]
    assert bench.stdout(job_id).read_bytes() == b"held\n"
    told = bench.told(job_id)
    assert told.count("unreachable") == told.count("reachable") == 1


def test_a_link_cut_while_large_code_is_sent_launches_it_once(bench: Bench) -> None:
    code = bench.code(LARGE_CODE)
    code += f"# {'x' * 997}\n" * (10_000_000 // 1000)
    for number in bench.numbers:
        bench.fleet.cut_after(number, 3_000_000)
    job_id = bench.server.submit(USER, code)
    bench.away(job_id)
    node = bench.node_of(job_id)
    assert bench.fleet.drops(node) > 0
    assert bench.starts(job_id) == []
    for number in bench.numbers:
        bench.fleet.heal(number)
    assert bench.completed(job_id) == [{"code": hashlib.sha256(code.encode()).hexdigest()}]


# ---- Half-open connections -----------------------------------------------------------------------------


def test_a_new_agent_displaces_one_whose_connection_died_without_a_word(bench: Bench) -> None:
    """The session is killed while packets are dropped, and the old agent cannot notice: it stands still."""
    talk = bench.talk(seed=30)
    node = talk.node
    old = the_agent(bench.fleet, node)
    bench.fleet.cut(node)
    send(old, signal.SIGSTOP)
    bench.fleet.kill_sessions(node)
    bench.fleet.heal(node)
    bench.wait(lambda: not is_alive(old), "the old agent to be displaced")
    talk.wait_for_more()
    assert the_agent(bench.fleet, node) != old
    talk.completed()


def test_nothing_of_a_given_up_connection_stays_on_the_node(bench: Bench) -> None:
    """The server's goodbye was dropped, so the node takes the old session for alive until the new agent comes."""
    talk = bench.talk(seed=31)
    node = talk.node
    old = [the_agent(bench.fleet, node), *bench.fleet.sessions(node)]
    bench.fleet.cut(node)
    bench.away(talk.job_id)
    assert all(map(is_alive, old))
    bench.fleet.heal(node)
    talk.wait_for_more()
    bench.wait(lambda: not any(map(is_alive, old)), "the old agent and its session to end")
    talk.completed()


# ---- SSH servers go and come back ----------------------------------------------------------------------


def test_jobs_outlive_a_restart_of_sshd(bench: Bench) -> None:
    talk = bench.talk(seed=40)
    node = talk.node
    bench.fleet.restart(node)
    talk.wait_for_more()
    bench.fleet.stop(node)
    bench.away(talk.job_id)
    talk.wait_for_more_on(node)
    bench.fleet.start(node)
    talk.wait_for_more()
    talk.completed()
    told = [event for event in bench.told(talk.job_id) if event.endswith("reachable")]
    assert told == ["unreachable", "reachable"] * 2


# ---- What takes long and mostly waits, each with a server and nodes of its own, all at once -------------


def _jump_host(network: NetnsFleet) -> str:
    with bench_on(network, 6) as bench:
        talk = bench.talk(seed=41)
        network.cut(0)  # a power cut sends no FIN either
        network.stop(0)
        bench.away(talk.job_id)
        jump = network.node(0).address
        bench.wait(lambda: jump in bench.away(talk.job_id)["message"], "a message that names the jump host")
        talk.wait_for_more_on(6)
        network.start(0)
        network.heal(0)
        began = time.monotonic()
        bench.back(talk.job_id)
        talk.wait_for_more()
        took = time.monotonic() - began
        talk.completed()
        assert bench.told(talk.job_id).count("unreachable") == bench.told(talk.job_id).count("reachable") == 1
        return f"jump host down for a while: output flows {took:.2f} s after it is back"


def _lost_node(network: NetnsFleet) -> str:
    with bench_on(network, 4, 5, NODE_LOST_AFTER="6") as bench:
        job_id = bench.server.submit(USER, bench.code(STUBBORN))
        bench.wait(lambda: bench.stdout(job_id).exists() and bench.stdout(job_id).stat().st_size, "output")
        lost = bench.node_of(job_id)
        processes = bench.processes(job_id, 0)
        network.cut(lost)
        began = time.monotonic()
        bench.away(job_id)
        bench.ran_again(job_id, lost, processes)
        return f"NODE_LOST_AFTER=6: runs on another node {time.monotonic() - began:.1f} s after the cut, all done"


def _lost_launch(network: NetnsFleet) -> str:
    with bench_on(network, 7, 8, NODE_LOST_AFTER="6") as bench:
        server = bench.server
        server.kill()
        server.settings["JOB_SERVER_FAILPOINT"] = "launch_sent:1"
        server.start()
        code = bench.code(STUBBORN)
        with contextlib.suppress(requests.ConnectionError):
            server.post(code, server.config(USER))
        assert server.process is not None
        server.process.wait(TIMEOUT)
        bench.wait(lambda: (bench.folder / "starts").read_text().endswith("\n"), "the job to start")
        job_id = (bench.folder / "starts").read_text().split()[0]
        processes = bench.processes(job_id, 0)
        (lost,) = (number for number in bench.numbers if bench.attempts(number, job_id))
        network.cut(lost)
        del server.settings["JOB_SERVER_FAILPOINT"]
        server.wait_for_nodes = False
        server.start()
        bench.ran_again(job_id, lost, processes)
        return "a launch that was never acknowledged: ran again elsewhere"


def _slow_link(network: NetnsFleet) -> str:
    with bench_on(network, 9) as bench:
        network.throttle(9, SLOW)
        code = bench.code(LARGE_RESULTS, lines=15, repeats=1500)
        code += f"# {'x' * 997}\n" * (2_500_000 // 1000)
        began = time.monotonic()
        job_id = bench.server.submit(USER, code)
        bench.wait(lambda: bench.starts(job_id), "a launch")
        launched_at = time.monotonic()
        bench.release(job_id)
        records = bench.completed(job_id)
        assert [record["text"] for record in records] == [
            hashlib.sha256(b"%d" % number).hexdigest() * 1500 for number in range(15)
        ]
        assert "unreachable" not in bench.told(job_id)
        return (
            f"at {SLOW} bytes/s: 2.5 MB of code start after {launched_at - began:.1f} s, "
            f"1.4 MB of results end {time.monotonic() - launched_at:.1f} s later"
        )


def _long_cut(network: NetnsFleet) -> str:
    with bench_on(network, 10) as bench:
        talk = bench.talk(seed=51)
        network.cut(10)
        cut_at = time.monotonic()
        bench.away(talk.job_id)
        talk.wait_for_more_on(10)
        time.sleep(max(0.0, cut_at + 30.0 - time.monotonic()))  # the fault's own length
        network.heal(10)
        healed_at = time.monotonic()
        talk.wait_for_more()
        took = time.monotonic() - healed_at
        talk.completed()
        assert [event for event in bench.told(talk.job_id) if event.endswith("reachable")] == [
            "unreachable",
            "reachable",
        ]
        return f"cut for 30 s: output flows {took:.2f} s after the cable is back"


def _too_slow_link(network: NetnsFleet) -> str:
    with bench_on(network, 11, 12) as bench:
        bench.drained(12, True)
        network.throttle(11, TOO_SLOW)
        code = bench.code(LARGE_CODE) + f"# {'x' * 997}\n" * 150
        began = time.monotonic()
        job_id = bench.server.submit(USER, code)
        bench.wait(lambda: "claimed" in bench.told(job_id), "the slow node to take the job")
        bench.drained(12, False)
        bench.wait(lambda: "requeued" in bench.told(job_id), "the slow node to give it up")
        took = time.monotonic() - began
        (record,) = bench.completed(job_id, attempts=2, launches=1)
        assert record["code"] == hashlib.sha256(code.encode()).hexdigest()
        assert bench.node_of(job_id) == 12
        (event,) = (event for event in bench.server.events(job_id, USER) if event["event"] == "requeued")
        assert (event["reason"], event["node_id"]) == ("launch_failed", "node-1")
        assert "its code did not get there in time" in event["message"]
        return f"at {TOO_SLOW} bytes/s: 150 kB of code are given to another node after {took:.1f} s"


STORIES: dict[str, Callable[[NetnsFleet], str]] = {
    "test_a_jump_host_may_go_down_and_come_back": _jump_host,
    "test_output_goes_on_after_a_cut_of_half_a_minute": _long_cut,
    "test_a_job_runs_again_elsewhere_only_when_the_lost_node_has_ended_it": _lost_node,
    "test_a_launch_that_nobody_acknowledged_is_over_before_another_node_runs_the_job": _lost_launch,
    "test_large_code_and_results_pass_a_slow_link": _slow_link,
    "test_code_that_a_link_is_too_slow_for_goes_to_another_node": _too_slow_link,
}


def test_a_jump_host_may_go_down_and_come_back(story: Callable[[], str], say: Callable[[str], None]) -> None:
    say(story())


def test_output_goes_on_after_a_cut_of_half_a_minute(story: Callable[[], str], say: Callable[[str], None]) -> None:
    say(story())


def test_a_job_runs_again_elsewhere_only_when_the_lost_node_has_ended_it(
    story: Callable[[], str], say: Callable[[str], None]
) -> None:
    say(story())


def test_a_launch_that_nobody_acknowledged_is_over_before_another_node_runs_the_job(
    story: Callable[[], str], say: Callable[[str], None]
) -> None:
    say(story())


def test_large_code_and_results_pass_a_slow_link(story: Callable[[], str], say: Callable[[str], None]) -> None:
    say(story())


def test_code_that_a_link_is_too_slow_for_goes_to_another_node(
    story: Callable[[], str], say: Callable[[str], None]
) -> None:
    say(story())


# ---- Slow links, and how long things take --------------------------------------------------------------


def _first_line_after(server: Server) -> float:
    """Seconds from the submission to the first byte of output that a follower gets."""
    config = server.config(USER)
    headers = {**server.bearer(USER), "Accept": "text/plain"}
    began = time.monotonic()
    job_id = server.post("print('here')", config).json()["job_id"]
    url = f"{server.url}/api/logs/{job_id}?follow=true"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        assert next(answer.iter_content(1)) == b"h"
        took = time.monotonic() - began
    server.wait_for(job_id, USER, timeout=TIMEOUT)
    return took


def test_a_slow_link_costs_a_job_about_one_round_trip(network: NetnsFleet, say: Callable[[str], None]) -> None:
    relay = network.relay(3)
    round_trip = 0.1
    near, far = [], []
    with Server({**SETTINGS, **network.settings(relays=[relay])}) as server:
        for _ in range(8):  # in turn, so that a busy machine slows both; the best of each is compared
            relay.delay = 0
            near.append(_first_line_after(server))
            relay.delay = round_trip / 2
            far.append(_first_line_after(server))
    more = min(far) - min(near)
    say(
        f"submit to first line: {min(near) * 1000:.0f} ms; with a round trip of {round_trip * 1000:.0f} ms "
        f"{min(far) * 1000:.0f} ms, {more / round_trip:.1f} round trips more"
    )
    assert min(far) > round_trip
    assert more < 3 * round_trip


def test_a_killed_server_adopts_every_node_again(bench: Bench, say: Callable[[str], None]) -> None:
    talks = [bench.talk(seed=50 + number) for number in range(len(bench.numbers))]
    assert {talk.node for talk in talks} == set(bench.numbers)
    bench.server.kill()
    began = time.monotonic()
    bench.server.wait_for_nodes = False
    bench.server.start()
    ready_at = time.monotonic()
    for talk in talks:
        bench.back(talk.job_id)
    adopted_at = time.monotonic()
    sizes = [talk.size() for talk in talks]
    for talk, size in zip(talks, sizes, strict=True):
        talk.wait_for_more(than=size)
    say(f"killed server: ready after {ready_at - began:.2f} s, all nodes adopted after {adopted_at - began:.2f} s")
    for talk in talks:
        talk.completed()
        assert bench.told(talk.job_id).count("adopted") == 1
