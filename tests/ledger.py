"""The ledger loop: clients work on a real server while it and its nodes are killed; then every promise is checked.

    python3 -m tests.ledger --seconds 600 --kills 200 [--seed N] [--no-node-faults]

The clients write down what was answered (the ledger). The jobs themselves hold kernel locks while they run — one per
job, one per user, one per node — so two of anything alive at once is seen by the kernel and not guessed from times.
What the server tells of itself (`job_events`) is replayed and held against both.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

import failpoints
import states
from tests.fleet import Fleet
from tests.server import FINAL, Server, wait_until

USERS = 12
# Printed by the job and computed by the client: whatever is lost, doubled or mixed up shows.
JOB = """
import fcntl, hashlib, json, os, sys, time
ledger, seed, lines, seconds, code, node = {ledger!r}, {seed}, {lines}, {seconds}, {code}, os.getuid()
held = []
mask = os.umask(0)  # another node's login must be able to open these, also when this job is killed at any moment
for kind, name in (("job", os.environ["JOB_ID"]), ("user", os.environ["USER_ID"]), ("node", node)):
    handle = open(f"{{ledger}}/{{kind}}-{{name}}.lock", "a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(f"{{ledger}}/violations", "a") as violations:
            violations.write(f"two alive at once: {{kind}} {{name}}, job {{os.environ['JOB_ID']}}\\n")
    held.append(handle)
os.umask(mask)
descriptor = os.open(f"{{ledger}}/starts", os.O_WRONLY | os.O_APPEND)
os.write(descriptor, (os.environ["JOB_ID"] + "\\n").encode())
for number in range(lines):
    print(hashlib.sha256(f"{{seed}}-{{number}}".encode()).hexdigest(), flush=number % 7 == 0)
    if number % 50 == 0:
        time.sleep(seconds * min(50, lines) / lines)
        print("e", number, file=sys.stderr, flush=True)
with open(os.environ["RESULTS_FILE"], "w") as results:
    results.write(json.dumps({{"seed": seed, "lines": lines}}) + "\\n")
sys.exit(code)
"""


def expected_stdout(seed: int, lines: int) -> bytes:
    """What a job with these numbers prints."""
    return b"".join(hashlib.sha256(f"{seed}-{n}".encode()).hexdigest().encode() + b"\n" for n in range(lines))


@dataclass
class Entry:
    """One acknowledged submission."""

    job_id: str
    user_id: str
    seed: int
    lines: int
    code: int
    cancel_asked: bool = False


@dataclass
class Ledger:
    """What was answered, and what went wrong."""

    folder: Path
    entries: list[Entry] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    recovery_seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        """Count something for the report."""
        with self.lock:
            self.counts[what] += 1

    def violation(self, text: str) -> None:
        """Write down a broken promise."""
        with self.lock:
            self.violations.append(text)


class Client(threading.Thread):
    """A user: submits, reads, now and then cancels; goes on whatever the server answers or does not."""

    def __init__(self, server: Server, ledger: Ledger, user_id: str, seed: int, over: threading.Event) -> None:
        super().__init__(name=user_id, daemon=True)
        self._server = server
        self._ledger = ledger
        self._user = user_id
        self._token = server.token(user_id)
        self._random = random.Random(seed)
        self._over = over

    def run(self) -> None:
        """Until told to stop."""
        while not self._over.is_set():
            try:
                entry = self._submit()
                if entry is not None:
                    self._follow(entry)
            except requests.RequestException:
                self._ledger.count("unanswered calls")
                self._over.wait(0.05)

    def _submit(self) -> Entry | None:
        rng = self._random
        seed, lines = rng.randrange(1 << 30), rng.choice((1, 30, 200, 2000))
        seconds, code = rng.choice((0.0, 0.2, 1.0, 2.5)), rng.choice((0, 0, 0, 3))
        text = JOB.format(ledger=str(self._ledger.folder), seed=seed, lines=lines, seconds=seconds, code=code)
        config = {
            "competition_id": "ledger",
            "project_id": "p",
            "user_id": self._user,
            "expected_time": 30,
            "token": self._token,
        }
        key = f"{seed}"
        # An answer that was lost is asked for again with the same key, as a careful client does.
        for _ in range(100):
            if self._over.is_set():
                return None
            try:
                response = self._server.post(text, config, headers={"Idempotency-Key": key}, timeout=10)
            except requests.RequestException:
                self._ledger.count("repeated submissions")
                self._over.wait(0.1)
                continue
            if response.status_code == 200:
                entry = Entry(response.json()["job_id"], self._user, seed, lines, code)
                with self._ledger.lock:
                    self._ledger.entries.append(entry)
                self._ledger.count("submitted")
                return entry
            if response.status_code not in (429, 503):
                self._ledger.violation(f"submission answered {response.status_code}: {response.text[:200]}")
            self._over.wait(0.1)
        return None

    def _follow(self, entry: Entry) -> None:
        """Until the job has ended; state may only move forward, and an end is an end."""
        cancel_after = self._random.choice((None, None, None, 0.0, 0.3, 1.0))
        began = time.monotonic()
        ended: str | None = None
        looks_after_end = 2
        while not self._over.is_set() and looks_after_end:
            if cancel_after is not None and time.monotonic() - began > cancel_after and not entry.cancel_asked:
                self._cancel(entry)
            with contextlib.suppress(requests.RequestException):
                response = requests.get(
                    f"{self._server.url}/api/status/{entry.job_id}",
                    headers={"Authorization": f"Bearer {self._token}"},
                    timeout=10,
                )
                if response.status_code == 404:
                    self._ledger.violation(f"job {entry.job_id} was acknowledged and is not there")
                    return
                if response.status_code == 200:
                    status = response.json()["status"]
                    if ended is not None and status != ended:
                        self._ledger.violation(f"job {entry.job_id} was {ended} and is {status}")
                    if status in FINAL:
                        ended = status
                        looks_after_end -= 1
            self._over.wait(0.05)

    def _cancel(self, entry: Entry) -> None:
        with contextlib.suppress(requests.RequestException):
            response = requests.post(
                f"{self._server.url}/api/cancel/{entry.job_id}",
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=15,
            )
            entry.cancel_asked = True
            self._ledger.count(f"cancel answered {response.status_code}")


class Chaos:
    """Kills the server, agents and sessions, and silences nodes."""

    def __init__(self, server: Server, fleet: Fleet, ledger: Ledger, seed: int, node_faults: bool) -> None:
        self._server = server
        self._fleet = fleet
        self._ledger = ledger
        self._random = random.Random(seed)
        self._node_faults = node_faults
        self.kills = 0

    def go_on(self, seconds: float, kills: int) -> None:
        """At least `kills` kills and at least `seconds` seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until or self.kills < kills:
            if self._node_faults and self._random.random() < 0.5:
                self._hurt_a_node()
            self._kill_server()

    def _kill_server(self) -> None:
        """At a failpoint, or at any moment."""
        rng = self._random
        assert self._server.process is not None
        if rng.random() < 0.6:
            name = failpoints.NAMES[self.kills % len(failpoints.NAMES)]
            self._restart({"JOB_SERVER_FAILPOINT": f"{name}:{rng.randint(1, 3)}"}, "server killed at once")
            try:
                self._server.process.wait(rng.uniform(1.0, 3.0))
                self._ledger.count(f"died at {name}")
            except Exception:
                self._server.kill()  # it did not come by that place in time
                self._ledger.count("server killed anywhere")
        else:
            time.sleep(rng.uniform(0.05, 2.0))
            self._server.kill()
            self._ledger.count("server killed anywhere")
        self.kills += 1
        self._restart({}, None)

    def _restart(self, extra: dict[str, str], kind: str | None) -> None:
        assert self._server.process is not None
        if self._server.process.poll() is None:
            self._server.kill()
            self.kills += 1
            self._ledger.count(kind or "server killed anywhere")
        self._server.settings.pop("JOB_SERVER_FAILPOINT", None)
        self._server.settings.update(extra)
        began = time.monotonic()
        try:
            self._server.start()
        except AssertionError:
            if not extra:
                raise  # armed, it may well die before it is ready
        else:
            if not extra:
                self._ledger.recovery_seconds.append(time.monotonic() - began)
        self._server.settings.pop("JOB_SERVER_FAILPOINT", None)

    def _hurt_a_node(self) -> None:
        rng = self._random
        number = rng.randint(1, len(self._fleet.nodes))
        fault: Callable[[int], Any] = rng.choice((self._cut, self._silence, self._kill_agent))
        fault(number)

    def _cut(self, number: int) -> None:
        self._fleet.kill_sessions(number)
        self._ledger.count("connections cut")

    def _silence(self, number: int) -> None:
        self._fleet.freeze(number)
        time.sleep(self._random.uniform(0.1, 3.0))
        self._fleet.thaw(number)
        self._ledger.count("nodes silenced")

    def _kill_agent(self, number: int) -> None:
        sessions = {process.pid for process in self._fleet.sessions(number)}
        for process in self._fleet.processes(number):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
                # Supervisors are forks of agents and look alike, but they are nobody's children.
                if b"serve" in words and process.parent in sessions:
                    os.kill(process.pid, 9)
                    self._ledger.count("agents killed")


def replay(rows: list[Any]) -> list[str]:
    """What is wrong with the story of one job (its `job_events`, in order)."""
    wrong: list[str] = []
    state: str | None = None
    epoch = -1
    started: Counter[int] = Counter()
    finals = 0
    for event in rows:
        if event["from_state"] != state:
            wrong.append(f"{event['event']} comes from {event['from_state']}, but the job was {state}")
        step = (event["from_state"], event["to_state"])
        if step[0] != step[1] and step not in states.TRANSITIONS:
            wrong.append(f"illegal transition {step}")
        if event["epoch"] < epoch:
            wrong.append(f"epoch fell from {epoch} to {event['epoch']}")
        if event["event"] in ("claimed", "adopted") and event["epoch"] == epoch:
            wrong.append(f"{event['event']} without a new epoch")
        if event["event"] == "started":
            started[event["attempt"]] += 1
        finals += event["to_state"] in states.FINAL and event["from_state"] not in states.FINAL
        state, epoch = event["to_state"], event["epoch"]
    if finals != 1:
        wrong.append(f"{finals} final events")
    return wrong


def check(server: Server, ledger: Ledger) -> list[str]:
    """Every promise, for every acknowledged job; the server is stopped."""
    wrong = list(ledger.violations)
    reported = ledger.folder / "violations"
    wrong += reported.read_text().splitlines()
    starts = Counter((ledger.folder / "starts").read_text().split())
    connection = sqlite3.connect(server.folder / "database.db")
    connection.row_factory = sqlite3.Row
    jobs = {row["job_id"]: row for row in connection.execute("SELECT * FROM jobs")}
    by_user = Counter(row["user_id"] for row in jobs.values())
    acknowledged = Counter(entry.user_id for entry in ledger.entries)
    for entry in ledger.entries:
        row = jobs.get(entry.job_id)
        if row is None:
            wrong.append(f"{entry.job_id}: acknowledged and lost")
            continue
        events = connection.execute("SELECT * FROM job_events WHERE job_seq = ? ORDER BY id", (row["seq"],)).fetchall()
        found = replay(events)
        found += _check_end(server, entry, row, starts[entry.job_id])
        wrong += [f"{entry.job_id} ({row['state']}): {text}" for text in found]
        if found:
            story = [f"{event['at'] % 10**9 / 1e6:.2f} {event['event']}/{event['node_id']}" for event in events]
            size = (server.jobs_dir / entry.job_id / "stdout").stat().st_size
            wrong.append(f"    {entry}, {size} bytes of stdout; {', '.join(story)}")
    for user_id, count in by_user.items():
        # A submission whose answer was lost may have made a job nobody was told of: one per user at most, the last.
        if count - acknowledged[user_id] not in (0, 1):
            wrong.append(f"{user_id}: {count} jobs, {acknowledged[user_id]} acknowledged")
    files = Counter(row["result_file"] for row in jobs.values() if row["result_file"])
    on_disk = {path.name for path in (server.jobs_dir / "results").iterdir()}
    wrong += [f"result file {name} belongs to {count} jobs" for name, count in files.items() if count != 1]
    wrong += [f"result file {name} of a completed job is missing" for name in files if name not in on_disk]
    wrong += [f"result file {name} belongs to no completed job" for name in on_disk if name not in files]
    return wrong


def _check_end(server: Server, entry: Entry, row: Any, started: int) -> list[str]:
    wrong = []
    state = row["state"]
    if state not in FINAL:
        return [f"not ended, {row['message']}"]
    if started > row["attempt"]:
        wrong.append(f"started {started} times in {row['attempt']} attempts")
    if state == states.CANCELLED and not entry.cancel_asked:
        wrong.append("cancelled though nobody asked")
    if state == states.FAILED and row["failure_reason"] != states.EXIT_CODE:
        wrong.append(f"failed for {row['failure_reason']}: {row['message']}")
    if state == states.FAILED and row["exit_code"] != entry.code:
        wrong.append(f"exit code {row['exit_code']}, truly {entry.code}")
    if state == states.COMPLETED and entry.code != 0:
        wrong.append(f"completed, but its exit code was {entry.code}")
    if state in (states.COMPLETED, states.FAILED):
        output = (server.jobs_dir / entry.job_id / "stdout").read_bytes()
        if output != expected_stdout(entry.seed, entry.lines):
            wrong.append(f"stdout is {len(output)} bytes and not what the job printed")
    if state == states.COMPLETED:
        content = (server.jobs_dir / "results" / row["result_file"]).read_bytes()
        if content != json.dumps({"seed": entry.seed, "lines": entry.lines}).encode() + b"\n":
            wrong.append(f"results are {content[:80]!r}")
    return wrong


def run(seconds: float, kills: int, seed: int, *, node_faults: bool = True) -> tuple[Ledger, list[str]]:
    """The whole loop; (ledger, broken promises)."""
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="ledger-") as name, Fleet(8) as fleet:
        folder = Path(name)
        folder.chmod(0o777)
        for file in ("starts", "violations"):
            (folder / file).touch()
            (folder / file).chmod(0o666)
        ledger = Ledger(folder)
        settings = {
            **fleet.settings(),
            "SUBMITS_PER_MINUTE": "100000",
            "SANDBOX": "off",  # the jobs must reach the ledger's locks
            "KILL_GRACE": "1",
            "NODE_PING_INTERVAL": "0.5",
            "NODE_PING_TIMEOUT": "2",
            "NODE_LOST_AFTER": "60",
            "QUARANTINE_AFTER": "1000",
            "MAX_INFRA_RETRIES": "20",
        }
        with Server(settings, wait_for_nodes=False) as server:
            clients = [Client(server, ledger, f"user{n}", seed * 1000 + n, over) for n in range(USERS)]
            for client in clients:
                client.start()
            chaos = Chaos(server, fleet, ledger, seed, node_faults)
            try:
                chaos.go_on(seconds, kills)
            finally:
                over.set()
                for client in clients:
                    client.join(60)
            ledger.counts["server kills in all"] = chaos.kills
            _wait_for_all(server)
            server.terminate()
            wrong = check(server, ledger)
        for lock in folder.glob("*.lock"):
            with open(lock) as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    wrong.append(f"{lock.name}: something of a job is still alive")
        return ledger, wrong


def _wait_for_all(server: Server) -> None:
    def ended() -> bool:
        with contextlib.closing(
            sqlite3.connect(f"file:{server.folder / 'database.db'}?mode=ro", uri=True)
        ) as connection:
            query = "SELECT count(*) FROM jobs WHERE state IN ('pending', 'running')"
            return bool(connection.execute(query).fetchone()[0] == 0)

    wait_until(ended, 120, "all jobs to end")


def report(ledger: Ledger, wrong: list[str]) -> str:
    """The figures as text."""
    lines = [f"{count:6} {what}" for what, count in sorted(ledger.counts.items())]
    times = sorted(ledger.recovery_seconds)
    if times:
        lines.append(f"start to ready after a kill: median {times[len(times) // 2]:.2f} s, most {times[-1]:.2f} s")
    lines.append(f"{len(wrong)} broken promises")
    return "\n".join([*lines, *wrong[:50]])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.ledger", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kills", type=int, default=0, help="at least so many kills")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--no-node-faults", action="store_true")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    ledger, wrong = run(arguments.seconds, arguments.kills, arguments.seed, node_faults=not arguments.no_node_faults)
    print(report(ledger, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
