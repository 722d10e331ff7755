"""The server dies by itself at each point of a job's way; started again, the job ends exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import failpoints
from tests.fleet import Fleet, missing_tools
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release, work_folders
from tests.records import assert_story, events_of, job_row, make_users, rows
from tests.server import FINAL, PROJECT, Server, clean_environment, wait_until

USER = "alice"
OTHER = "bob"
LINES = 300
# The job notes each of its starts where no restart of the server can lose or double the note.
CODE = """
import json, os
os.write(os.open({starts!r}, os.O_WRONLY | os.O_APPEND), b"started\\n")
for number in range({lines}):
    print("line", number, flush=number % 100 == 0)
{hold}
with open(os.environ["RESULTS_FILE"], "w") as results:
    results.write(json.dumps({{"lines": {lines}}}) + "\\n")
print("last line")
"""
STDOUT = "".join(f"line {number}\n" for number in range(LINES)) + "last line\n"
AT_THE_START = ("adopted", "reconciled")  # reached by a server that finds a job of a former one
ON_NODES = ("requeued",)  # reached only after an infrastructure failure


@pytest.fixture
def starts() -> Iterator[Path]:
    """A file any job may append to."""
    with tempfile.TemporaryDirectory(prefix="gpu-job-server-test-") as name:
        Path(name).chmod(0o755)
        path = Path(name) / "starts"
        path.touch()
        path.chmod(0o666)
        yield path


@pytest.fixture(scope="module")
def embedded() -> Iterator[Server]:
    """A server on this machine; each test stops it and starts it as it needs."""
    settings = {"SUBMITS_PER_MINUTE": "10000", "NUM_GPU_NODES": "2", "SANDBOX": "off"}
    with make_users(Server(settings), USER) as running:
        yield running


@pytest.fixture
def pair() -> Iterator[Fleet]:
    """Two SSH nodes."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(2) as fleet:
        yield fleet


def start(server: Server, failpoint: str | None = None) -> None:
    """Start it anew. Armed, it may die before it is ready."""
    if server.process is not None and server.process.poll() is None:
        server.kill()
    if failpoint is None:
        server.start()
        return
    server.settings["JOB_SERVER_FAILPOINT"] = failpoint
    try:
        with contextlib.suppress(AssertionError, requests.ConnectionError):
            server.start()
    finally:
        del server.settings["JOB_SERVER_FAILPOINT"]


def died_by_itself(server: Server) -> bool:
    """Waits for its end; whether that was the failpoint's signal and not one of the test's."""
    assert server.process is not None
    return server.process.wait(40) == -signal.SIGKILL


def submit(server: Server, starts: Path, hold: str = "") -> requests.Response:
    """Submit the job; the same one each time, by its key."""
    code = CODE.format(starts=str(starts), lines=LINES, hold=hold)
    return server.post(code, server.config(USER), headers={"Idempotency-Key": starts.parent.name}, timeout=40)


def assert_ended_once(server: Server, job_id: str, starts: Path, attempts: int = 1) -> None:
    """Completed with everything it printed, published under one name, its story without a gap, started as told."""
    server.wait_for(job_id, USER, timeout=60)
    answer = server.results(job_id, USER)
    assert answer["status"] == "completed", answer
    assert (answer["attempt"], answer["exit_code"]) == (attempts, 0)
    assert answer["stdout"] == STDOUT
    assert (server.jobs_dir / job_id / "stdout").read_text() == STDOUT
    assert answer["results"] == [{"lines": LINES}]
    row = job_row(server, job_id)
    published = server.jobs_dir / "results" / row["result_file"]
    assert json.loads(published.read_text()) == {"lines": LINES}
    named = {found["result_file"] for found in rows(server, "SELECT result_file FROM jobs")}
    assert {path.name for path in (server.jobs_dir / "results").iterdir()} == named - {None}
    assert_story(server, job_id)
    assert [event["to_state"] in FINAL for event in events_of(server, job_id)].count(True) == 1
    assert starts.read_text().count("started") == attempts


def assert_nothing_left_on_the_nodes(folders: list[Path]) -> None:
    """The nodes' copies of attempts go only after the end is durable, but go they must."""

    def left() -> list[Path]:
        return [attempt for folder in folders for attempt in folder.glob("*/*/attempts/*")]

    wait_until(lambda: not left(), 30, "the nodes to forget the attempt")


def test_every_failpoint_is_tried() -> None:
    reached = {
        name for path in PROJECT.glob("*.py") for name in failpoints.NAMES if f'reach("{name}")' in path.read_text()
    }
    assert reached == set(failpoints.NAMES)
    assert {*AT_THE_START, *ON_NODES} <= set(failpoints.NAMES)


@pytest.mark.parametrize("name", [name for name in failpoints.NAMES if name not in (*AT_THE_START, *ON_NODES)])
def test_job_under_way_ends_once_when_the_server_dies_at(embedded: Server, starts: Path, name: str) -> None:
    start(embedded, name)
    with contextlib.suppress(requests.ConnectionError):  # it may die before it has answered
        assert submit(embedded, starts).status_code == 200
    assert died_by_itself(embedded)
    start(embedded)
    again = submit(embedded, starts)
    assert (again.status_code, again.headers.get("Idempotency-Replayed")) == (200, "true"), again.text
    assert_ended_once(embedded, again.json()["job_id"], starts)
    assert_nothing_left_on_the_nodes([embedded.jobs_dir / ".nodes"])


@pytest.mark.parametrize("name", AT_THE_START)
def test_running_job_ends_once_when_the_next_server_dies_at(embedded: Server, starts: Path, name: str) -> None:
    start(embedded)
    job_id = submit(embedded, starts, hold=f"os.mkfifo('go')\n{WAIT_FOR_RELEASE}").json()["job_id"]
    embedded.wait_for_output(job_id, USER, f"line {LINES - 200}\n")
    embedded.kill()
    start(embedded, name)
    assert died_by_itself(embedded)
    start(embedded)
    release(embedded, None, job_id)
    assert_ended_once(embedded, job_id, starts)
    assert len(events_of(embedded, job_id, "adopted")) == 2
    assert_nothing_left_on_the_nodes([embedded.jobs_dir / ".nodes"])


def test_job_that_runs_again_ends_once_when_the_server_dies_at_requeued(pair: Fleet, starts: Path) -> None:
    with make_users(Server({**pair.settings(), "SANDBOX": "off"}), USER, OTHER) as server:
        start(server, "requeued")
        # Its pause may be hardly one: the other node must not claim it before the server is dead.
        in_the_way = server.submit(OTHER, HOLD)
        server.wait_for_output(in_the_way, OTHER, "held")
        job_id = submit(server, starts, hold=f"os.mkfifo('go')\n{WAIT_FOR_RELEASE}").json()["job_id"]
        server.wait_for_output(job_id, USER, f"line {LINES - 200}\n")
        first = server.status(job_id, USER)["node_id"]
        (folder,) = work_folders(server, pair, job_id)
        os.kill(json.loads((folder.parent / "supervisor.json").read_text())["pid"], signal.SIGKILL)
        assert died_by_itself(server)
        row = job_row(server, job_id)
        assert (row["state"], row["node_id"], row["infra_failures"]) == ("pending", None, 1)
        start(server)
        release(server, pair, in_the_way)
        assert server.wait_for(job_id, USER, ["running"])["node_id"] != first
        release(server, pair, job_id)
        assert_ended_once(server, job_id, starts, attempts=2)
        assert_nothing_left_on_the_nodes([node.home / ".gpu-job-server" for node in pair.nodes])


def test_unknown_failpoint_stops_the_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import failpoints"],
        cwd=PROJECT,
        env=clean_environment({"JOB_SERVER_FAILPOINT": "nowhere"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "'nowhere'" in done.stderr
    assert failpoints.NAMES[0] in done.stderr
