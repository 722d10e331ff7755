"""What goes wrong under the server — its disk, its database, its own stop and start — loses nothing and is said in
words. Real mounts, real locks, real signals."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from database import Database
from services import FREE_BYTES_KEPT
from tests.fleet import Fleet, missing_tools
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release
from tests.records import assert_story, database_of, finished, make_users, rows
from tests.server import FINAL, Server, free_port, wait_until

USERS = ("alice", "bob", "carol")
SETTINGS = {"SUBMITS_PER_MINUTE": "10000", "KILL_GRACE": "1"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Fleet]:
    """Two SSH nodes of this file alone."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(2) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def embedded() -> Iterator[Server]:
    """A server on this machine."""
    with make_users(Server({**SETTINGS, "NUM_GPU_NODES": "2"}), *USERS) as running:
        yield running


@contextlib.contextmanager
def on_small_disks(size: str, **settings: str) -> Iterator[Server]:
    """A server whose database and whose JOBS_DIR lie on a small disk each."""
    server = Server({**SETTINGS, **settings})
    database, jobs = server.folder / "db", server.jobs_dir
    server.settings["DATABASE_URL"] = f"sqlite:///{database / 'database.db'}"
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        for folder in (database, jobs):
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        stack.callback(lambda: server.process is not None and server.process.poll() is None and server.terminate())
        try:
            make_users(server, *USERS).start()
            yield server
        except BaseException:
            print(f"--- server.log\n{server.log()[-6000:]}")
            raise


# -- small things --------------------------------------------------------------------------------------------------


def held(server: Server, user_id: str, code: str = HOLD) -> str:
    """A job of the user that is at its pipe."""
    job_id = server.submit(user_id, code)
    server.wait_for_output(job_id, user_id, "held\n", timeout=60)
    return job_id


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all room of that disk but `leave` bytes; remove the file to give it back."""
    path = folder / "filler"
    with open(path, "wb", 0) as filler:
        room = os.statvfs(folder)
        with contextlib.suppress(OSError):
            os.posix_fallocate(filler.fileno(), 0, max(4096, room.f_bavail * room.f_frsize - leave))
        with contextlib.suppress(OSError):
            filler.seek(0, 2)
            while not leave:
                filler.write(bytes(4096))
    return path


def fill_database_disk(server: Server) -> Path:
    """No room for the next commit: what the log has room for already is taken away first."""
    path = database_of(server)
    with open(path.with_name(path.name + ".write-lock"), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            filler = fill(path.parent)
    return filler


def results_of(server: Server) -> list[str]:
    return sorted(path.name for path in (server.jobs_dir / "results").iterdir())


# -- the disk is full ----------------------------------------------------------------------------------------------


@needs_root
def test_full_disk_of_the_database_refuses_submissions_and_keeps_what_ends(nodes: Fleet) -> None:
    with on_small_disks("8m", **nodes.settings()) as server:
        job_id = held(server, "alice")
        filler = fill_database_disk(server)
        key = {"Idempotency-Key": "the-same"}
        refused = server.post("print('later')\n", server.config("bob"), headers=key)
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert "database cannot be used right now; nothing was changed" in refused.json()["detail"]
        # What can be read is read; what ends is kept until it can be written down.
        assert server.status(job_id, "alice")["status"] == "running"
        release(server, nodes, job_id)
        wait_until(lambda: results_of(server), 60, "the results to be published")
        wait_until(
            lambda: "database cannot be used" in server.status(job_id, "alice")["message"], 60, "the commit to fail"
        )
        assert server.status(job_id, "alice")["status"] == "running"
        assert rows(server, "SELECT * FROM jobs WHERE user_id = 'bob'") == []

        filler.unlink()
        answer = finished(server, job_id, "alice")
        assert (answer["status"], answer["attempt"], answer["stdout"]) == ("completed", 1, "held\n")
        assert results_of(server) == [answer["result_file"]]
        assert_story(server, job_id)
        again = server.post("print('later')\n", server.config("bob"), headers=key, wait=60)
        assert (again.status_code, again.headers.get("Idempotency-Replayed")) == (200, None)
        assert again.json()["stdout"] == "later\n"


LARGE = 300_000
STEPS = f"""
import json, os
os.mkfifo('go')
print('held', flush=True)
{WAIT_FOR_RELEASE}
print('y' * {LARGE}, flush=True)
{WAIT_FOR_RELEASE}
with open(os.environ['RESULTS_FILE'], 'w') as results:
    results.write(json.dumps({{'text': 'z' * {LARGE}}}) + '\\n')
"""


@needs_root
def test_full_disk_of_the_jobs_delays_output_and_results_and_loses_none(nodes: Fleet) -> None:
    with on_small_disks("8m", **nodes.settings()) as server:
        job_id = held(server, "alice", STEPS)

        def told() -> bool:
            return "No space left on device" in server.status(job_id, "alice")["message"]

        filler = fill(server.jobs_dir)
        release(server, nodes, job_id)
        wait_until(told, 60, "output that finds no room")
        # A new job is taken and started; only what it prints waits, as does what the other one prints.
        second = server.submit("bob", "print('second')\n")
        status = server.wait_for(job_id, "alice", ["running"])
        assert server.get("/api/jobs", "alice").status_code == 200
        assert len(server.get(f"/api/logs/{job_id}", "alice").content) < LARGE
        filler.unlink()
        server.wait_for_output(job_id, "alice", "y" * LARGE, timeout=60)
        assert finished(server, second, "bob")["stdout"] == "second\n"

        filler = fill(server.jobs_dir)
        release(server, nodes, job_id)
        wait_until(told, 60, "results that find no room")
        assert server.status(job_id, "alice")["status"] == "running"
        assert not any("alice" in name for name in results_of(server))
        filler.unlink()
        answer = finished(server, job_id, "alice")
        assert (answer["status"], answer["attempt"], answer["node_id"]) == ("completed", 1, status["node_id"])
        assert answer["stdout"] == "held\n" + "y" * LARGE + "\n"
        assert answer["results"] == [{"text": "z" * LARGE}]
        published = (server.jobs_dir / "results" / answer["result_file"]).read_bytes()
        assert hashlib.sha256(published).hexdigest() == answer["result_sha256"]
        for ended in (job_id, second):
            assert_story(server, ended)
        assert len(results_of(server)) == 2
        assert not [
            path for path in server.jobs_dir.rglob("*") if path.name.endswith(".tmp") or ".incoming" in path.name
        ]


@needs_root
def test_below_the_floor_submissions_wait_and_running_jobs_go_on() -> None:
    with on_small_disks("16m", NUM_GPU_NODES="2", MIN_FREE_DISK=str(8 << 20), NODE_MIN_FREE_DISK="0") as server:
        job_id = held(server, "alice")
        filler = fill(server.jobs_dir, leave=4 << 20)
        time.sleep(2 * FREE_BYTES_KEPT)  # so long the look holds that alice's submission took
        refused = server.post("pass\n", server.config("bob"))
        assert (refused.status_code, int(refused.headers["Retry-After"])) == (503, 60)
        assert "disk is nearly full" in refused.json()["detail"]
        # A limit of the user's own is the earlier answer.
        assert server.post("pass\n", server.config("alice")).status_code == 429
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert "MIN_FREE_DISK" in ready.json()["reasons"][0]
        assert server.get("/healthz").status_code == 200
        release(server, None, job_id)
        assert finished(server, job_id, "alice")["status"] == "completed"
        assert rows(server, "SELECT * FROM jobs WHERE user_id = 'bob'") == []
        # A refusal is never a look that is over: room that came a moment ago is found.
        assert server.post("pass\n", server.config("bob")).status_code == 503
        filler.unlink()
        assert server.run_job("bob")["status"] == "completed"
        assert server.get("/readyz").status_code == 200


def test_removed_folder_of_the_jobs_costs_the_ended_jobs_only(nodes: Fleet) -> None:
    with make_users(Server({**SETTINGS, **nodes.settings()}), *USERS) as server:
        ended = server.run_job("alice")
        job_id = held(server, "bob")
        shutil.rmtree(server.jobs_dir)
        assert server.get("/readyz").status_code == 200
        answer = server.run_job("carol", "print('after')\n")
        assert (answer["status"], answer["stdout"]) == ("completed", "after\n")
        release(server, nodes, job_id)
        answer = finished(server, job_id, "bob")
        assert (answer["status"], answer["stdout"], answer["attempt"]) == ("completed", "held\n", 1)
        for form in ("json", "jsonl"):
            gone = server.get(f"/api/results/{ended['job_id']}?format={form}", "alice")
            assert (gone.status_code, gone.json()["detail"]) == (404, "The job's files are not kept any more.")
        for query in ("", "?follow=true"):
            assert server.get(f"/api/logs/{ended['job_id']}{query}", "alice").status_code == 404
        assert server.status(ended["job_id"], "alice")["status"] == "completed"


# -- the database --------------------------------------------------------------------------------------------------

HOLD_LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(3)
"""


def test_submission_waits_for_another_process_that_holds_the_database(embedded: Server) -> None:
    config = embedded.config("alice")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(database_of(embedded))], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        answers: list[requests.Response] = []
        client = threading.Thread(target=lambda: answers.append(embedded.post("print('x')\n", config, wait=60)))
        client.start()
        reads = 0
        while holder.poll() is None:  # nobody who only reads has to wait
            assert embedded.get("/api/jobs", "bob").status_code == 200
            assert answers == [] or holder.poll() is not None
            reads += 1
        assert reads > 3
        client.join(60)
    (answer,) = answers
    assert (answer.status_code, answer.json()["status"]) == (200, "completed"), answer.text
    assert_story(embedded, answer.json()["job_id"])


def make_newer(path: Path) -> None:
    Database(f"sqlite:///{path}").close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()


def make_truncated(path: Path) -> None:
    Database(f"sqlite:///{path}").close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, path.stat().st_size // 2)


def make_garbage(path: Path) -> None:
    path.write_bytes(b"This was a database once. " * 1000)


def make_folder_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("in the way")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(make_newer, "has schema 9999, which this version", id="newer"),
        pytest.param(make_truncated, "malformed", id="truncated"),
        pytest.param(make_garbage, "file is not a database", id="garbage"),
        pytest.param(make_folder_a_file, "cannot be opened", id="folder"),
    ],
)
def test_unusable_database_stops_the_start_with_a_sentence(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "db"
    folder.mkdir()
    path = folder / "database.db"
    make(path)
    before = path.read_bytes() if path.exists() else None
    assert_refused(path, words)
    assert (path.read_bytes() if path.exists() else None) == before


@needs_root
def test_read_only_database_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path / 'database.db'}").close()
    subprocess.run(["mount", "--bind", str(tmp_path), str(tmp_path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
        assert_refused(tmp_path / "database.db", "cannot be opened")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def assert_refused(database: Path, words: str, **settings: str) -> None:
    """The start ends with 1 and a line that names the file."""
    server = Server({"DATABASE_URL": f"sqlite:///{database}", **settings})
    try:
        done = server.run("main.py", code=1)
    finally:
        server.close()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("main.py: ")]
    assert str(database) in line
    assert words in line
    assert "Traceback" not in done.stderr


def test_missing_folder_of_the_database_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "database.db"
    with Server({"DATABASE_URL": f"sqlite:///{path}", "NUM_GPU_NODES": "1"}) as server:
        make_users(server, "alice")
        assert server.run_job("alice")["status"] == "completed"
    assert path.exists()


def test_second_server_on_one_database_is_told_who_holds_it(embedded: Server) -> None:
    assert embedded.process is not None
    words = f"Another server (process {embedded.process.pid}) already works on"
    assert_refused(database_of(embedded), words, SERVER_PORT=str(free_port()), JOBS_DIR=str(embedded.jobs_dir))
    assert embedded.run_job("alice")["status"] == "completed"


# -- stopping ------------------------------------------------------------------------------------------------------


class Knocking(threading.Thread):
    """Submits as another user, over a new connection each time, until the server is gone."""

    def __init__(self, server: Server, user_id: str) -> None:
        super().__init__()
        self._server = server
        self._config = server.config(user_id)
        self.seen: Counter[Any] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        while True:
            try:
                response = self._server.post("pass\n", self._config, timeout=20)
            except requests.ConnectionError as error:
                self.seen["no connection"] += 1
                if "refused" in str(error):
                    return
                continue
            except requests.RequestException as error:
                self.wrong.append(repr(error))
                return
            self.seen[response.status_code] += 1
            if response.status_code == 503 and "Retry-After" not in response.headers:
                self.wrong.append(response.text)
            if response.status_code not in (200, 429, 503):
                self.wrong.append(response.text)


def test_sigterm_ends_the_server_in_seconds_and_answers_everyone(nodes: Fleet) -> None:
    settings = {**nodes.settings(), "NODE_PING_INTERVAL": "1", "NODE_PING_TIMEOUT": "30"}
    with make_users(Server({**SETTINGS, **settings}), *USERS, "dave", "erin") as server:
        jobs = {user: held(server, user) for user in ("alice", "bob")}
        silent = server.status(jobs["bob"], "bob")["node_id"]
        key = {"Idempotency-Key": "wait"}
        waiting = server.submit("carol", "print('carol')\n")
        answers: list[requests.Response] = []
        client = threading.Thread(
            target=lambda: answers.append(server.post("print('dave')\n", server.config("dave"), headers=key, wait=90))
        )
        knocking = Knocking(server, "erin")
        client.start()
        wait_until(lambda: server.get("/api/jobs", "dave").json()["jobs"], 30, "the client to wait")
        knocking.start()
        wait_until(lambda: knocking.seen[200] + knocking.seen[429] > 3, 30, "clients to come")
        nodes.freeze(int(silent.removeprefix("node-")))
        half = socket.create_connection(("127.0.0.1", server.port))
        try:
            # Someone sends half a request, someone keeps a connection open, and a node has fallen silent.
            half.sendall(
                b"POST /api/submit HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: a/b\r\n\r\nabc"
            )
            with requests.Session() as session:
                assert session.get(f"{server.url}/healthz", timeout=20).status_code == 200
                began = time.monotonic()
                assert server.terminate() == 0
                took = time.monotonic() - began
            assert took < 5 * slowness(), f"{took:.1f} s"
            client.join(20)
            knocking.join(20)
            assert not client.is_alive()
            assert not knocking.is_alive()
            assert knocking.wrong == []
            (answer,) = answers
            assert (answer.status_code, answer.json()["status"]) == (200, "pending")
        finally:
            half.close()
            nodes.thaw(int(silent.removeprefix("node-")))
        server.start()
        for user, job_id in jobs.items():
            assert server.status(job_id, user)["status"] == "running"
            release(server, nodes, job_id)
            ended = finished(server, job_id, user)
            assert (ended["status"], ended["attempt"], ended["stdout"]) == ("completed", 1, "held\n")
            assert_story(server, job_id)
        assert finished(server, waiting, "carol")["stdout"] == "carol\n"
        assert finished(server, answer.json()["job_id"], "dave")["stdout"] == "dave\n"


def slowness() -> float:
    """How many times slower this machine is now than one that does nothing else, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# -- a rolling restart ---------------------------------------------------------------------------------------------


class Working(threading.Thread):
    """A user with one job after the other; whatever is not answered is asked again."""

    def __init__(self, server: Server, user_id: str, over: threading.Event) -> None:
        super().__init__()
        self._server = server
        self._user = user_id
        self._config = server.config(user_id)
        self._over = over
        self.jobs: dict[str, str] = {}  # job: what it must have printed
        self.ended = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            word = f"{self._user}-{number}"
            lines = "".join(f"{word} {line}\n" for line in range(20))
            code = f"import time\nfor n in range(20):\n    print({word!r}, n, flush=True)\n    time.sleep(0.1)\n"
            job_id = self._insist(lambda: self._submit(code, word))  # noqa: B023
            self.jobs[job_id] = lines
            self._insist(lambda: self._has_ended(job_id))  # noqa: B023
            self.ended += 1

    def _insist(self, call: Callable[[], Any]) -> Any:
        while True:
            with contextlib.suppress(requests.ConnectionError):
                found = call()
                if found:
                    return found
            self._over.wait(0.1)

    def _submit(self, code: str, key: str) -> str | None:
        answer = self._server.post(code, self._config, headers={"Idempotency-Key": key}, wait=20, timeout=60)
        if answer.status_code == 200:
            return str(answer.json()["job_id"])
        if answer.status_code != 503:
            self.wrong.append(answer.text)
        return None

    def _has_ended(self, job_id: str) -> bool:
        answer = self._server.get(f"/api/status/{job_id}", self._user)
        if answer.status_code != 200:
            self.wrong.append(answer.text)
        return answer.json().get("status") in FINAL


@pytest.mark.slow
def test_rolling_restart_under_load_interrupts_nobody() -> None:
    over = threading.Event()
    users = [f"user-{number}" for number in range(8)]
    with make_users(Server({**SETTINGS, "NUM_GPU_NODES": "8"}), *users) as server:
        clients = [Working(server, user, over) for user in users]
        for client in clients:
            client.start()
        interrupted = 0
        try:
            for _ in range(3):
                before = {client: client.ended for client in clients}
                wait_until(lambda: all(client.ended > before[client] for client in clients), 60, "jobs to end")  # noqa: B023
                wait_until(lambda: server.get("/api/nodes").json()["running_jobs"] >= 4, 60, "jobs to run")
                assert server.terminate() == 0
                interrupted += rows(server, "SELECT count(*) AS n FROM jobs WHERE state = 'running'")[0]["n"]
                server.start()
        finally:
            over.set()
            for client in clients:
                client.join(60)
        assert not any(client.is_alive() for client in clients)
        assert [client.wrong for client in clients if client.wrong] == []
        assert interrupted >= 3
        expected = {job_id: lines for client in clients for job_id, lines in client.jobs.items()}
        stored = {row["job_id"]: row for row in rows(server, "SELECT * FROM jobs")}
        assert set(stored) == set(expected)
        for job_id, lines in expected.items():
            row = stored[job_id]
            assert (row["state"], row["attempt"], row["infra_failures"]) == ("completed", 1, 0), dict(row)
            assert (server.jobs_dir / job_id / "stdout").read_text() == lines
            assert_story(server, job_id)
        assert len(results_of(server)) == len(expected)
        (adopted,) = rows(server, "SELECT count(*) AS n FROM job_events WHERE event = 'adopted'")
        assert adopted["n"] >= interrupted
