"""What goes wrong on a node is the node's fault: the job runs again elsewhere, its user is charged nothing, and a node
that is not fit gets no work until a look finds it fit. Real SSH nodes, real faults."""

from __future__ import annotations

import ast
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import tests.server
import worker
from config import Settings
from executor import Probe
from tests.fleet import Fleet, missing_tools
from tests.fresh import copy_project
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release, work_folders
from tests.records import assert_story, events_of, finished, job_row, make_users, rows
from tests.server import PROJECT, Server, wait_until

ADMIN, USER, OTHER = "the-admin", "alice", "bob"
NODE_DIR = ".gpu-job-server"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
SETTINGS = {
    "SUBMITS_PER_MINUTE": "10000",
    "KILL_GRACE": "1",
    "NODE_PING_INTERVAL": "1",
    "NODE_PING_TIMEOUT": "8",
    "NODE_LOST_AFTER": "300",  # far beyond every deadline here: what happens, happens without it
    "NODE_MIN_FREE_DISK": "0",
    "QUARANTINE_AFTER": "1000",
}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class FaultyFleet(Fleet):
    """Nodes that can be restarted: after that, the kernel's boot id is another one there."""

    boots: dict[int, int]

    def open(self) -> Fleet:
        """As any fleet."""
        self.boots = {}
        return super().open()

    def command_prefix(self, number: int) -> list[str]:
        """The node's SSH server, and all it starts, sees its own boot id."""
        boot = self.boots.get(number)
        if boot is None:
            return []
        path = self.folder / f"boot-id-{number}"
        path.write_text(f"00000000-0000-4000-8000-{boot:012d}\n")
        return ["unshare", "-m", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"', str(path)]

    def reboot(self, number: int) -> None:
        """Everything on the node is dead, its disk is as it was, and it comes back under another boot id."""
        self.stop(number)
        self.kill_processes(number)
        self.boots[number] = self.boots.get(number, 0) + 1
        self.start(number)


@pytest.fixture(scope="module")
def nodes() -> Iterator[FaultyFleet]:
    """Three nodes of this file alone."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with FaultyFleet(3) as fleet:
        assert isinstance(fleet, FaultyFleet)
        yield fleet


def of(fleet: Fleet, *numbers: int, **settings: str) -> Server:
    """A server that has only these nodes of the fleet, as node-1, node-2, …"""
    entries = json.loads(fleet.settings()["GPU_NODES"])
    chosen = json.dumps([entries[number - 1] for number in numbers])
    return ready(Server({**SETTINGS, **fleet.settings(), "GPU_NODES": chosen, **settings}))


def ready(server: Server) -> Server:
    """With all users of these tests."""
    return make_users(server, USER, OTHER, "carol", admin=ADMIN)


@contextlib.contextmanager
def small_disk(fleet: Fleet, number: int, size: str) -> Iterator[Path]:
    """A disk of that size as the node's folder for agent and attempts."""
    node = fleet.node(number)
    folder = node.home / NODE_DIR
    folder.mkdir(exist_ok=True)
    owner = folder.parent.stat()
    options = f"size={size},mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        fleet.kill_processes(number)
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def pair(nodes: FaultyFleet) -> Iterator[Server]:
    """A server on the first two nodes that looks at them all the time."""
    with of(nodes, 1, 2, NODE_PROBE_INTERVAL="1") as server:
        yield server


@pytest.fixture
def server(pair: Server) -> Iterator[Server]:
    """It, with both nodes fit and idle."""
    for number in (1, 2):
        until_node(pair, number, "to be online", lambda seen: seen["status"] == "online")
    yield pair
    for state in ("pending", "running"):
        for job in pair.get(f"/api/jobs?status={state}", ADMIN).json()["jobs"]:
            pair.cancel(job["job_id"], ADMIN)


@pytest.fixture
def cramped(nodes: FaultyFleet) -> Iterator[tuple[Server, Path]]:
    """A server whose node-1 has a disk of 4 MB, which it does not mind; and that disk."""
    with small_disk(nodes, 1, "4m") as disk, of(nodes, 1, 2) as server:
        yield server, disk


# -- small things --------------------------------------------------------------------------------------------------


def microseconds(stamp: str) -> int:
    return int(datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() * 1_000_000)


def held(server: Server, job_id: str, user_id: str, attempt: int = 1) -> dict[str, Any]:
    """The job's status once this attempt of it has come to its pipe."""

    def look() -> dict[str, Any] | None:
        status = server.status(job_id, user_id)
        return status if status["attempt"] == attempt and status["started_at"] is not None else None

    found: dict[str, Any] = wait_until(look, 60, f"attempt {attempt} of job {job_id} to start")
    server.wait_for_output(job_id, user_id, "held\n", timeout=60)
    return found


def number_of(status: dict[str, Any]) -> int:
    """node-2 is 2."""
    return int(status["node_id"].removeprefix("node-"))


def node(server: Server, number: int = 1) -> dict[str, Any]:
    """A node as an admin sees it."""
    found: dict[str, Any] = server.get("/api/nodes", ADMIN).json()["nodes"][number - 1]
    return found


def until_node(server: Server, number: int, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The node as an admin sees it, once it is so."""
    seen = node(server, number)

    def look() -> bool:
        nonlocal seen
        seen = node(server, number)
        return condition(seen)

    try:
        wait_until(look, 60, f"node-{number} {what}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it is {seen}") from None
    return seen


def kill_supervisor(server: Server, fleet: Fleet, job_id: str, attempt: int = 1) -> None:
    (folder,) = [
        path.parent for path in work_folders(server, fleet, job_id) if path.parent.name.endswith(f".{attempt}")
    ]
    os.kill(json.loads((folder / "supervisor.json").read_text())["pid"], signal.SIGKILL)


def run_on(server: Server, number: int, user_id: str) -> str:
    """A held job of the user on that node: the others get no work until it is there."""
    others = [
        seen["node_id"] for seen in server.get("/api/nodes").json()["nodes"] if seen["node_id"] != f"node-{number}"
    ]
    for node_id in others:
        steer(server, node_id, "drain")
    job_id = server.submit(user_id, HOLD)
    assert held(server, job_id, user_id)["node_id"] == f"node-{number}"
    for node_id in others:
        steer(server, node_id, "resume")
    return job_id


def steer(server: Server, node_id: str, what: str) -> None:
    """Drain or resume a node."""
    url = f"{server.url}/api/admin/nodes/{node_id}/{what}"
    assert requests.post(url, headers=server.bearer(ADMIN), timeout=30).status_code == 200


# -- the node goes away under the job ------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("when", ["with the disk kept", "with the disk wiped", "while the server was away"])
def test_job_of_a_restarted_node_runs_again_at_once(nodes: FaultyFleet, server: Server, when: str) -> None:
    job_id = server.submit(USER, HOLD)
    first = held(server, job_id, USER)
    number = number_of(first)
    if when == "while the server was away":
        server.kill()
    if when == "with the disk wiped":
        nodes.stop(number)
        nodes.kill_processes(number)
        subprocess.run(["rm", "-rf", str(nodes.node(number).home / NODE_DIR)], check=True)
    try:
        nodes.reboot(number)
        if when == "while the server was away":
            server.start()
        second = held(server, job_id, USER, attempt=2)
    finally:
        nodes.boots.clear()
        nodes.restart(number)
    assert second["node_id"] != first["node_id"]
    release(server, nodes, job_id)
    answer = finished(server, job_id, USER)
    assert (answer["status"], answer["attempt"], answer["stdout"]) == ("completed", 2, "held\n")
    assert_story(server, job_id)
    (requeued,) = events_of(server, job_id, "requeued")
    assert requeued["reason"] == "node_lost"
    assert f"{first['node_id']} was restarted" in requeued["message"]
    assert (server.jobs_dir / job_id / "stdout.attempt-1").read_text() == "held\n"


def test_job_is_tried_again_on_other_nodes_after_a_pause_until_it_is_given_up(
    nodes: FaultyFleet, server: Server
) -> None:
    failures = [node(server, number)["infra_failures"] for number in (1, 2)]
    response = server.post(HOLD, server.config(USER))
    left = int(response.headers["X-RateLimit-Remaining"])
    job_id = response.json()["job_id"]
    used = []
    for attempt in (1, 2, 3):
        used.append(held(server, job_id, USER, attempt)["node_id"])
        if attempt > 1:
            assert events_of(server, job_id, "claimed")[-1]["at"] >= job_row(server, job_id)["not_before"]
        kill_supervisor(server, nodes, job_id, attempt)
        if attempt < 3:
            wait_until(lambda: len(events_of(server, job_id, "requeued")) == attempt, 60, "the job to be requeued")  # noqa: B023
            requeued = events_of(server, job_id, "requeued")[-1]
            pause = job_row(server, job_id)["not_before"] - requeued["at"]
            assert -1_000_000 < pause < 2**attempt * 1_000_000
            assert requeued["reason"] == "node_lost"
            status = server.status(job_id, USER)
            assert "supervisor there was killed" in status["message"] or status["status"] == "running"
    assert used[0] != used[1] != used[2]
    answer = finished(server, job_id, USER)
    assert (answer["status"], answer["failure_reason"], answer["attempt"]) == ("failed", "node_lost", 3)
    assert "Given up after 3 attempts; this was not your code's fault." in answer["message"]
    assert answer["exit_code"] is None
    assert_story(server, job_id)
    after = [node(server, number)["infra_failures"] for number in (1, 2)]
    assert after == [failures[0] + used.count("node-1"), failures[1] + used.count("node-2")]

    # Three attempts were one submission, and the user's place is free.
    response = server.post("raise SystemExit(3)\n", server.config(USER), wait=60)
    assert response.status_code == 200, response.text
    assert int(response.headers["X-RateLimit-Remaining"]) >= left - 1
    assert (response.json()["failure_reason"], response.json()["attempt"]) == ("exit_code", 1)


def test_what_the_code_does_wrong_happens_once_and_is_no_fault_of_the_node(server: Server) -> None:
    before = [node(server, number)["infra_failures"] for number in (1, 2)]
    for code, reason in (
        ("raise SystemExit(3)\n", "exit_code"),
        ("import os; os.kill(os.getpid(), 9)\n", "signal"),
        ("import os; open(os.environ['RESULTS_FILE'], 'w').write('no JSON')\n", "results_invalid"),
        ("import time\ntime.sleep(600)\n", "timeout"),
    ):
        answer = server.run_job(USER, code, expected_time=1)
        assert (answer["status"], answer["failure_reason"], answer["attempt"]) == ("failed", reason, 1)
    assert [node(server, number)["infra_failures"] for number in (1, 2)] == before


# -- the node's disk -----------------------------------------------------------------------------------------------


@needs_root
def test_disk_too_full_for_the_launch_sends_the_job_elsewhere(nodes: FaultyFleet, cramped: tuple[Server, Path]) -> None:
    server, _ = cramped
    in_the_way = run_on(server, 2, OTHER)
    job_id = server.submit(USER, "#" * 6_000_000 + "\nprint('through')\n")
    (requeued,) = wait_until(lambda: events_of(server, job_id, "requeued"), 60, "the launch to fail")
    assert (requeued["node_id"], requeued["reason"]) == ("node-1", "node_disk_full")
    assert "No space left on device" in requeued["message"]
    assert server.status(job_id, USER)["status"] == "pending"
    # What did not fit left nothing behind: a smaller one fits.
    assert server.run_job("carol", "print('small')\n")["node_id"] == "node-1"
    # The job itself waits for another node, also when its pause is over and this one is idle.
    due = job_row(server, job_id)["not_before"]
    wait_until(lambda: time.time_ns() // 1000 > due + 1_000_000, 20, "the pause to be over")
    assert server.run_job("carol", "print('small')\n")["node_id"] == "node-1"
    assert server.status(job_id, USER)["status"] == "pending"
    release(server, nodes, in_the_way)
    answer = finished(server, job_id, USER)
    assert (answer["status"], answer["node_id"], answer["attempt"]) == ("completed", "node-2", 2)
    assert answer["stdout"] == "through\n"
    assert_story(server, job_id)


FILL = """
import os
os.mkfifo("go")
print("before", flush=True)
open("go").read()
with open("fill", "wb", 0) as fill:
    try:
        while True:
            fill.write(bytes(4096))
    except OSError:
        pass
print("x" * 50_000, flush=True)
open("go").read()
raise SystemExit(7)
"""


@needs_root
def test_disk_filled_while_the_job_runs_cuts_its_output_and_nothing_else(
    nodes: FaultyFleet, cramped: tuple[Server, Path]
) -> None:
    server, disk = cramped
    in_the_way = run_on(server, 2, OTHER)
    job_id = server.submit(USER, FILL)
    # A disk that is full before the first block of the output is written has no room for any of it.
    server.wait_for_output(job_id, USER, "before", timeout=60)
    release(server, nodes, job_id)
    server.wait_for_output(job_id, USER, "xxx", timeout=60)
    # Nobody is there when the job ends on the full disk: the room for its record was taken before it started.
    server.kill()
    release(server, nodes, job_id)
    (attempt,) = disk.glob(f"*/*/attempts/{job_id}.1")
    wait_until((attempt / "exit.json").exists, 60, "the exit record")
    assert os.statvfs(disk).f_bavail < 50
    record = json.loads((attempt / "exit.json").read_text())
    assert (record["exit_code"], record["stdout_truncated"]) == (7, True)
    assert "No space left" in record["output_error"]
    server.start()
    answer = finished(server, job_id, USER)
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "exit_code", 7)
    assert answer["stdout_truncated"] is True
    assert answer["stdout"].startswith("before\nxxx")
    assert len(answer["stdout"]) < 50_000
    assert answer["attempt"] == 1
    assert_story(server, job_id)
    # With the attempt its files go, and with them the shortage.
    wait_until(lambda: os.statvfs(disk).f_bavail > 500, 60, "the attempt's files to be removed")
    following = server.run_job(USER, "print('next')\n")
    assert (following["node_id"], following["stdout"]) == ("node-1", "next\n")
    release(server, nodes, in_the_way)


@needs_root
def test_node_with_too_little_room_gets_no_work_until_there_is_more(nodes: FaultyFleet) -> None:
    limits = {"NODE_MIN_FREE_DISK": str(16 << 20), "NODE_PROBE_INTERVAL": "1"}
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(nodes, 1, "8m"))
        stack.enter_context(small_disk(nodes, 3, "16k"))
        server = of(nodes, 1, 2, 3, **limits)
        server.wait_for_nodes = False
        stack.enter_context(server)
        # One has not even room for the agent.
        seen = until_node(server, 3, "to be refused", lambda seen: "No space left" in (seen["reason"] or ""))
        assert seen["status"] == "offline"
        seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
        assert "less than NODE_MIN_FREE_DISK" in seen["reason"]
        assert 0 < seen["free_bytes"] < 16 << 20
        in_the_way = server.submit(OTHER, HOLD)
        assert held(server, in_the_way, OTHER)["node_id"] == "node-2"
        job_id = server.submit(USER, "print('at last')\n")
        waiting = server.post("pass\n", server.config("carol"), wait=2).json()  # long enough to be claimed, were it so
        assert (waiting["status"], server.status(job_id, USER)["status"]) == ("pending", "pending")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        answer = finished(server, job_id, USER)
        assert (answer["status"], answer["node_id"], answer["attempt"]) == ("completed", "node-1", 1)
        assert node(server)["reason"] is None
        release(server, nodes, in_the_way)


# -- the node's Python and driver ----------------------------------------------------------------------------------


def move_folder(fleet: Fleet, number: int) -> Path:
    """Take the agents' folder of a node away in one step: where it is now."""
    folder = fleet.node(number).home / NODE_DIR
    return folder.rename(folder.with_name(f"{NODE_DIR}-away"))


def remove(folder: Path) -> None:
    while folder.exists():  # somebody may still be writing there
        shutil.rmtree(folder, ignore_errors=True)


def test_folder_removed_from_an_idle_node_is_made_anew_before_the_next_job(nodes: FaultyFleet) -> None:
    with of(nodes, 1) as server:
        server.run_job(USER)
        remove(move_folder(nodes, 1))
        answer = server.run_job(USER, "print('through')\n")
        assert (answer["attempt"], answer["stdout"]) == (1, "through\n")
        until_node(server, 1, "to be online", lambda seen: seen["status"] == "online" and seen["reason"] is None)


def test_folder_removed_under_a_job_costs_it_neither_its_output_nor_another_attempt(nodes: FaultyFleet) -> None:
    with of(nodes, 1) as server:
        job_id = server.submit(USER, "import time\nprint('before', flush=True)\ntime.sleep(2)\nprint('after')\n")
        server.wait_for_output(job_id, USER, "before", timeout=60)
        remove(move_folder(nodes, 1))
        answer = finished(server, job_id, USER)
        assert (answer["status"], answer["attempt"], answer["stdout"]) == ("completed", 1, "before\nafter\n")
        assert_story(server, job_id)
        assert server.run_job(USER, "print('next')\n")["attempt"] == 1


def test_folder_moved_away_under_a_job_does_not_cost_it_its_results(nodes: FaultyFleet) -> None:
    size = 300_000  # more than comes with the exit
    write = f"open('results.jsonl', 'w').write(json.dumps({{'a': 'x' * {size}}}))"
    with of(nodes, 1) as server:
        job_id = server.submit(USER, f"import json, time\n{write}\nprint('before', flush=True)\ntime.sleep(2)\n")
        server.wait_for_output(job_id, USER, "before", timeout=60)
        away = move_folder(nodes, 1)
        answer = finished(server, job_id, USER)
        remove(away)
        assert (answer["status"], answer["attempt"], answer["results"]) == ("completed", 1, [{"a": "x" * size}])


def test_python_that_vanishes_sends_the_job_elsewhere(nodes: FaultyFleet) -> None:
    with of(nodes, 1, 2, PRESTART="false") as server:  # else the next job's Python is running already
        in_the_way = run_on(server, 2, OTHER)
        nodes.break_python(1)
        try:
            job_id = server.submit(USER, "print('through')\n")
            (requeued,) = wait_until(lambda: events_of(server, job_id, "requeued"), 60, "the launch to fail")
            assert (requeued["node_id"], requeued["reason"]) == ("node-1", "launch_failed")
            assert "No such file or directory" in requeued["message"]
            release(server, nodes, in_the_way)
            answer = finished(server, job_id, USER)
            assert (answer["status"], answer["node_id"], answer["attempt"]) == ("completed", "node-2", 2)
            # Once the connection is gone there is no coming back without it, and the reason is said.
            nodes.kill_sessions(1)
            seen = until_node(server, 1, "to be refused", lambda seen: "NODE_PYTHON" in (seen["reason"] or ""))
            assert seen["status"] == "offline"
        finally:
            nodes.mend_python(1)


def test_python_found_missing_keeps_work_away_and_leaves_the_running_job_in_peace(nodes: FaultyFleet) -> None:
    tools = [nodes.node(number).folder / "bin" / "job-python" for number in (1, 2)]
    for tool in tools:
        tool.symlink_to(nodes.python)
    with of(nodes, 1, 2, JOB_PYTHON="job-python", NODE_PROBE_INTERVAL="1") as server:
        running = run_on(server, 1, OTHER)
        tools[0].unlink()
        until_node(server, 1, "to be found unfit", lambda seen: "No usable Python" in (seen["reason"] or ""))
        nodes.kill_sessions(1)  # the job is found again all the same
        release(server, nodes, running)
        assert finished(server, running, OTHER)["status"] == "completed"
        assert until_node(server, 1, "to be free", lambda seen: not seen["is_busy"])["status"] == "quarantined"
        for _ in range(2):
            assert server.run_job(USER)["node_id"] == "node-2"
        tools[0].symlink_to(nodes.python)
        until_node(server, 1, "to be fit again", lambda seen: seen["status"] == "online")


def test_hanging_driver_does_not_keep_a_job_from_its_end(nodes: FaultyFleet, server: Server) -> None:
    job_id = run_on(server, 1, USER)
    nodes.set_gpu(1, delay=600)
    try:
        server.kill()
        server.start()
        release(server, nodes, job_id)
        assert finished(server, job_id, USER)["status"] == "completed"
        seen = until_node(server, 1, "to be free", lambda seen: not seen["is_busy"])
        assert (seen["status"], seen["reason"]) == ("quarantined", "it has not been looked at yet")
        assert server.run_job(USER)["node_id"] == "node-2"
    finally:
        nodes.set_gpu(1, delay=0)
        nodes.kill_sessions(1)  # the look that hangs ends with them


# -- a stranger on the GPU -----------------------------------------------------------------------------------------


def test_stranger_on_the_gpu_keeps_work_away_until_it_is_gone(nodes: FaultyFleet, server: Server) -> None:
    in_the_way = run_on(server, 2, OTHER)
    nodes.set_gpu(1, processes=[{"pid": os.getpid(), "name": "miner", "memory": 9000}])
    try:
        seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
        assert f"miner (process {os.getpid()})" in seen["reason"]
        uuid = json.loads(nodes.node(1).gpu_path.read_text())["gpus"][0]["uuid"]
        shown = {"pid": os.getpid(), "name": "miner", "gpu_uuid": uuid, "memory_mib": 9000}
        assert seen["foreign_processes"] == [shown]
        for user_id in (None, OTHER):
            assert "miner" not in server.get("/api/nodes", user_id).text
        job_id = server.submit(USER, "print('at last')\n")
        waiting = server.post("pass\n", server.config("carol"), wait=2).json()
        assert (waiting["status"], server.status(job_id, USER)["status"]) == ("pending", "pending")
        check = server.run("main.py", "check")  # told, but for the server to wait
        assert f"process {os.getpid()} (miner) uses a GPU" in check.stdout
    finally:
        nodes.set_gpu(1, processes=[])
    answer = finished(server, job_id, USER)
    assert (answer["status"], answer["node_id"], answer["attempt"]) == ("completed", "node-1", 1)
    assert node(server)["foreign_processes"] == []
    release(server, nodes, in_the_way)


def test_job_is_no_stranger_on_its_gpu_not_even_when_it_starts_during_a_look(
    nodes: FaultyFleet, server: Server
) -> None:
    def looked_at(used: int) -> None:
        until_node(server, 1, "to be looked at", lambda seen: seen["gpu_memory_used_mib"] == used)

    nodes.set_gpu(1, memory_used=5, delay=1)  # from now on, one look follows the other
    try:
        looked_at(5)
        job_id = run_on(server, 1, USER)
        identity = json.loads((work_folders(server, nodes, job_id)[0].parent / "supervisor.json").read_text())
        (job,) = [found for found in nodes.processes(1) if found.pid == identity["job_pid"]]
        nodes.set_gpu(1, memory_used=777, processes=[{"pid": job.pid, "name": "python3", "memory": 700}])
        reasons = set()

        def looked() -> bool:
            seen = node(server)
            reasons.add((seen["reason"], len(seen["foreign_processes"])))
            return bool(seen["gpu_memory_used_mib"] == 777)

        wait_until(looked, 60, "the node to be looked at")
        assert reasons == {(None, 0)}
    finally:
        nodes.set_gpu(1, memory_used=3, processes=[], delay=0)
    looked_at(3)
    assert node(server)["reason"] is None
    release(server, nodes, job_id)
    assert finished(server, job_id, USER)["status"] == "completed"


# -- what a job leaves ---------------------------------------------------------------------------------------------

RARE_LOOKS = {"NODE_PROBE_INTERVAL": "600"}  # so that only the look after a job can have seen it


def test_memory_that_a_job_leaves_on_the_gpu_keeps_work_away_until_it_is_back(nodes: FaultyFleet) -> None:
    with of(nodes, 1, **RARE_LOOKS) as server:
        began = time.monotonic()
        job_id = server.submit(USER, HOLD)
        held(server, job_id, USER)
        nodes.set_gpu(1, memory_used=9000)
        try:
            wait_until(lambda: time.monotonic() > began + 2 * worker.QUICK_JOB)  # long enough to have used a GPU
            release(server, nodes, job_id)
            assert finished(server, job_id, USER)["status"] == "completed"
            seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
            following = server.submit(OTHER, "print('at last')\n")
            assert (
                seen["reason"] == "GPU 0 has 9000 MiB in use without a job; more than NODE_IDLE_GPU_MEMORY (1024 MiB)"
            )
            assert server.status(following, OTHER)["status"] == "pending"
        finally:
            nodes.set_gpu(1, memory_used=3)
        answer = finished(server, following, OTHER)
        assert (answer["status"], answer["attempt"]) == ("completed", 1)
        assert node(server)["reason"] is None


def test_what_counts_as_left_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(used: list[int | None], gpus: list[int] | None, before: dict[int, int] | None = None) -> str | None:
        rows = [{"index": index, "uuid": f"GPU-{index}", "memory_used_mib": mib} for index, mib in enumerate(used)]
        return worker.left_behind(Probe.of({"gpus": rows}), gpus, Settings(_env_file=None), before)  # type: ignore[call-arg]

    assert left([1024, None], None) is None
    assert (
        left([1024, 1025], None) == "GPU 1 has 1025 MiB in use without a job; more than NODE_IDLE_GPU_MEMORY (1024 MiB)"
    )
    assert left([1024, 1025], [0]) is None, "the other is not the node's"
    # A screen on this machine's GPU has had some before.
    assert left([4000], None, {0: 3000}) is None
    told = left([4025], None, {0: 3000})
    assert told is not None
    assert "more than 3000 MiB before the job and NODE_IDLE_GPU_MEMORY" in told
    monkeypatch.setenv("NODE_IDLE_GPU_MEMORY", "0")
    assert left([80_000], None) is None


def test_driver_that_fails_after_a_job_keeps_work_away_until_it_answers(nodes: FaultyFleet) -> None:
    with of(nodes, 1, **RARE_LOOKS) as server:
        began = time.monotonic()
        job_id = server.submit(USER, HOLD)
        held(server, job_id, USER)
        nodes.set_gpu(1, error="Unable to determine the device handle for GPU: GPU is lost.")
        try:
            wait_until(lambda: time.monotonic() > began + 2 * worker.QUICK_JOB)
            release(server, nodes, job_id)
            assert finished(server, job_id, USER)["status"] == "completed"
            seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
            assert "its GPU cannot be looked at any more: " in seen["reason"]
            assert "GPU is lost" in seen["reason"]
        finally:
            nodes.set_gpu(1, error=None)
        assert server.run_job(OTHER)["status"] == "completed"


@needs_root
def test_disk_that_is_full_after_a_job_keeps_work_away_until_there_is_room(nodes: FaultyFleet) -> None:
    with (
        small_disk(nodes, 1, "64m") as disk,
        of(nodes, 1, NODE_MIN_FREE_DISK=str(16 << 20), **RARE_LOOKS) as server,
    ):
        job_id = server.submit(USER, HOLD)
        held(server, job_id, USER)
        filler = disk / "filler"
        filler.write_bytes(bytes(56 << 20))
        release(server, nodes, job_id)
        assert finished(server, job_id, USER)["status"] == "completed"
        seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
        assert "less than NODE_MIN_FREE_DISK" in seen["reason"]
        filler.unlink()
        assert server.run_job(OTHER)["status"] == "completed"


# -- quarantine ----------------------------------------------------------------------------------------------------


def test_failures_in_a_row_quarantine_a_node_for_a_while(nodes: FaultyFleet) -> None:
    pause = 4
    limits = {"QUARANTINE_AFTER": "2", "QUARANTINE_SECONDS": str(pause), "MAX_INFRA_RETRIES": "9"}
    with of(nodes, 1, NODE_PROBE_INTERVAL="600", **limits) as server:
        job_id = server.submit(USER, HOLD)
        for attempt in (1, 2):
            held(server, job_id, USER, attempt)
            assert node(server)["status"] == "busy"
            kill_supervisor(server, nodes, job_id, attempt)
        seen = until_node(server, 1, "to be quarantined", lambda seen: seen["status"] == "quarantined")
        assert seen["reason"].startswith("2 infrastructure failures in a row; the last: node-1 was restarted, or")
        assert seen["infra_failures"] == 2
        assert any("no node takes jobs" in warning for warning in server.get("/readyz").json()["warnings"])
        status = server.status(job_id, USER)
        assert (status["status"], status["queue_position"], status["estimated_start"]) == ("pending", 1, None)
        assert "no node takes jobs at the moment" in status["message"]
        # Only time, and a look that finds nothing wrong, end it.
        held(server, job_id, USER, attempt=3)
        third = events_of(server, job_id, "claimed")[2]
        since = microseconds(seen["since"])
        assert abs(since - events_of(server, job_id, "requeued")[1]["at"]) < 5_000_000
        assert third["at"] - since >= pause * 1_000_000 - 100_000
        assert node(server)["reason"] is None
        release(server, nodes, job_id)
        assert finished(server, job_id, USER)["status"] == "completed"
        # A job that goes well ends the row of failures.
        (stored,) = rows(server, "SELECT * FROM nodes WHERE node_id = 'node-1'")
        assert (stored["infra_failures"], stored["consecutive_infra_failures"]) == (2, 0)


# -- the server's own change under running jobs --------------------------------------------------------------------

STEPS = f"import os\nos.mkfifo('go')\nprint('held', flush=True)\n{WAIT_FOR_RELEASE}"
STEPS += f"print('second', flush=True)\n{WAIT_FOR_RELEASE}print('third')\n"


@pytest.mark.parametrize("place", ["on this machine", "over SSH"])
def test_job_goes_on_under_a_server_that_brings_another_agent(
    nodes: FaultyFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from node_agent import AGENT_VERSION

    fleet = nodes if place == "over SSH" else None
    embedded = {"NUM_GPU_NODES": "1", "KILL_GRACE": "1"}
    with of(nodes, 1) if fleet is not None else ready(Server(embedded)) as server:
        job_id = server.submit(USER, STEPS)
        held(server, job_id, USER)
        copy_project(tmp_path)
        agent = tmp_path / "node_agent" / "agent.py"
        agent.write_text(agent.read_text() + "# A line more than before.\n")
        assert server.terminate() == 0
        monkeypatch.setattr(tests.server, "PROJECT", tmp_path)
        server.start()
        release(server, fleet, job_id)
        server.wait_for_output(job_id, USER, "second\n", timeout=60)
        (attempt,) = [path.parent for path in work_folders(server, fleet, job_id)]
        assert json.loads((attempt / "supervisor.json").read_text())["agent_version"] == AGENT_VERSION
        if fleet is not None:
            kept = {path.stem for path in (fleet.node(1).home / NODE_DIR / "agent").glob("*.py")}
            assert AGENT_VERSION in kept
            assert len(kept) >= 2
        release(server, fleet, job_id)
        answer = finished(server, job_id, USER)
        assert (answer["status"], answer["attempt"]) == ("completed", 1)
        assert answer["stdout"] == "held\nsecond\nthird\n"
        assert len(events_of(server, job_id, "started")) == len(events_of(server, job_id, "adopted")) == 1
        assert_story(server, job_id)
        # The next one is supervised by the new version.
        following = server.submit(USER, HOLD)
        held(server, following, USER)
        (attempt,) = [path.parent for path in work_folders(server, fleet, following)]
        assert json.loads((attempt / "supervisor.json").read_text())["agent_version"] != AGENT_VERSION
        release(server, fleet, following)
        assert finished(server, following, USER)["status"] == "completed"


# -- a node whose wall clock is wrong ------------------------------------------------------------------------------

WALL_CLOCK = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.asctime", "time.mktime"),
    *("time.strftime", "time.CLOCK_REALTIME", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
    *("clock.now_us", "signal.ITIMER_REAL"),
}


def users_of_the_wall_clock(path: Path) -> set[str]:
    """The functions of a file in which a name that gives the wall clock stands."""
    found = set()

    def walk(tree: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(tree):
            inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Attribute) and ".".join(ast.unparse(child).split(".")[-2:]) in WALL_CLOCK:
                found.add(inner)
            if isinstance(child, ast.ImportFrom) and child.module in ("time", "datetime", "clock"):
                found.add(f"import from {child.module}")
            walk(child, inner)

    walk(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def test_wrong_clock_of_a_node_can_change_nothing() -> None:
    # Leases, time limits and launches are measured in the node's CLOCK_BOOTTIME, which nobody can set, so an hour more
    # or less is not seen. The one look at the wall clock is at the age of a folder that no supervisor has locked; what
    # is wrong about that age only decides when it is removed.
    agent = PROJECT / "node_agent" / "agent.py"
    assert users_of_the_wall_clock(agent) == {"clear_leftovers"}
    clock = next(
        item for item in ast.parse(agent.read_text()).body if isinstance(item, ast.FunctionDef) and item.name == "clock"
    )
    assert ast.unparse(clock.body[-1]) == "return time.clock_gettime(CLOCK)"
    # On the server's side only the moment of a job's end is the wall clock's.
    for name in ("executor", "ssh_executor", "local_executor"):
        assert users_of_the_wall_clock(PROJECT / f"{name}.py") == set(), name
    assert users_of_the_wall_clock(PROJECT / "worker.py") == {"_ended"}


def test_search_for_the_wall_clock_finds_it(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            "time.time()",
            "x = datetime.datetime.now()",
            "from time import time",
            "f(default=time.time)",
            "clock.now_us()",
        )
    ):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        assert users_of_the_wall_clock(path), text
    path.write_text("time.monotonic(); clock(); time.clock_gettime(CLOCK)")
    assert not users_of_the_wall_clock(path)


# -- drain and resume ----------------------------------------------------------------------------------------------


def test_draining_from_the_shell_holds_with_and_without_a_running_server() -> None:
    with ready(Server({"SUBMITS_PER_MINUTE": "10000", "NUM_GPU_NODES": "2"})) as server:
        done = server.run("main.py", "drain", "local-1")
        assert "local-1 gets no further job" in done.stdout
        seen = until_node(server, 1, "to be drained", lambda seen: seen["status"] == "draining")
        assert seen["reason"].startswith("drained by shell:")
        for _ in range(3):
            assert server.run_job(USER)["node_id"] == "local-2"
        # What was drained in one way may be resumed in the other.
        steer(server, "local-1", "resume")
        steer(server, "local-2", "drain")
        assert server.run_job(USER)["node_id"] == "local-1"

        assert server.terminate() == 0
        server.run("main.py", "drain", "local-1")
        server.start()
        assert [node(server, number)["status"] for number in (1, 2)] == ["draining", "draining"]
        waiting = server.submit(USER)
        server.run("main.py", "resume", "local-2")
        until_node(server, 2, "to be resumed", lambda seen: seen["status"] == "online")
        answer = finished(server, waiting, USER)
        assert (answer["status"], answer["node_id"]) == ("completed", "local-2")
        refused = server.run("main.py", "drain", "local-9", code=1)
        assert "There is no node local-9; the settings name local-1, local-2." in refused.stderr
