"""Every attack of `attacks.py`, run as a real job through the public API on real nodes: over SSH with the sandbox, over
SSH without it, and on the embedded default. After each an honest job must succeed on that very node.

Each place runs the programme once, a round of attacks at a time, one attack on every node at once; the tests then read
what came of it. Attacks that cost a node its agent, or a job its supervisor, run by themselves, at the end.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from attacks import (
    ATTACKS,
    CONTAINED,
    LOOK,
    MARK,
    NOT_APPLICABLE,
    NOT_CONTAINED,
    READY,
    SMALL_LIMITS,
    Answer,
    Attack,
    weigh,
)
from tests.fleet import Fleet, missing_tools
from tests.held_jobs import HOLD, make_tokens, pids_with, release
from tests.server import Server, wait_until
from tests.test_submit_checks import CODES, HOSTILE_CONFIGS, HOSTILE_IDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NODES = 4
ADMIN = "the-admin"
SETTINGS = {
    "SUBMITS_PER_MINUTE": "10000",
    "KILL_GRACE": "1",
    "NODE_PING_INTERVAL": "1",
    "NODE_PING_TIMEOUT": "15",
    "NODE_LOST_AFTER": "120",
    "NODE_MIN_FREE_DISK": "0",
    "QUARANTINE_AFTER": "1000",
    "REQUEST_BODY_TIMEOUT": "2",
    **{f"MAX_{name.upper()}": str(value) for name, value in SMALL_LIMITS.items()},
    "JOB_COMMAND": "{python} -u {code}",
}
NEEDS_RESULTS = {"JOB_COMMAND": "{python} -u {code} {results}"}
PLACES = ("ssh, sandbox", "ssh, bare", "embedded")


@dataclass
class Trial:
    """What came of one attack in one place."""

    answer: Answer
    looked: dict[str, Any]
    node_id: str
    raw: bytes
    events: list[dict[str, Any]]


def user_of(attack: Attack) -> str:
    return f"attacker-{ATTACKS.index(attack)}"


class Place:
    """A server on nodes of one kind, and what the attacks came to there."""

    def __init__(self, kind: str, fleet: Fleet | None, stack: ExitStack) -> None:
        self.kind = kind
        self.fleet = fleet
        self.settings = {
            **SETTINGS,
            "NUM_GPU_NODES": str(NODES),
            "SANDBOX": "off" if kind == "ssh, bare" else "required",
            **(fleet.settings() if fleet else {}),
        }
        self.server = self._serve(stack, {})
        self.memory_before = resident(self.server)
        self.trials: dict[str, Trial] = {}
        plain = [attack for attack in ATTACKS if not attack.needs_results]
        calm = sorted((attack for attack in plain if not attack.may_end_supervisor), key=lambda a: a.expected_time)
        rounds = [calm[at : at + NODES] for at in range(0, len(calm), NODES)]
        rounds += [[attack] for attack in plain if attack.may_end_supervisor]
        for attacks in rounds:
            self._round(self.server, attacks)
        self.memory_after = resident(self.server)
        with ExitStack() as inner:
            strict = self._serve(inner, NEEDS_RESULTS, nodes=1)
            self._round(strict, [attack for attack in ATTACKS if attack.needs_results])

    def _serve(self, stack: ExitStack, more: dict[str, str], nodes: int = NODES) -> Server:
        settings = {**self.settings, **more, "NUM_GPU_NODES": str(nodes)}
        if "GPU_NODES" in settings:
            settings["GPU_NODES"] = json.dumps(json.loads(settings["GPU_NODES"])[:nodes])
        server = stack.enter_context(Server(settings))
        lookers = [f"looker-{number}" for number in range(NODES)]
        coders = [f"coder-{number}" for number in range(len(CODES))]
        make_tokens(server, [*map(user_of, ATTACKS), *lookers, *coders, "alice", "a", "a_b", "honest"], admin=ADMIN)
        return server

    def _port(self) -> int:
        return self.fleet.nodes[0].port if self.fleet else self.server.port

    def _round(self, server: Server, attacks: list[Attack]) -> None:
        """These attacks at once, then an honest job on every node at once: each node gets one."""
        jobs = {
            attack: server.submit(user_of(attack), attack.program(self._port()), expected_time=attack.expected_time)
            for attack in attacks
        }
        for attack in attacks:
            if attack.cancel:
                server.wait_for_output(jobs[attack], user_of(attack), READY, timeout=60)
                assert server.cancel(jobs[attack], user_of(attack)).status_code in (200, 202)
        for attack, job_id in jobs.items():
            server.wait_for(job_id, user_of(attack), timeout=100)
        everywhere = self._look_everywhere(server)
        for attack, job_id in jobs.items():
            user = user_of(attack)
            ended = server.results(job_id, user)
            raw = server.get(f"/api/logs/{job_id}?stream=stdout", user, headers={"Accept": "text/plain"}).content
            answer = Answer(
                **{name: ended[name] for name in Answer.__dataclass_fields__ if name not in ("seconds", "survivors")},
                seconds=seconds_of(ended),
            )
            looked = dict(everywhere.get(ended["node_id"], {}))
            looked["running"] = [*looked.get("running", []), *pids_with(MARK)]
            self.trials[attack.name] = Trial(answer, looked, ended["node_id"], raw, server.events(job_id, user))

    def _look_everywhere(self, server: Server) -> dict[str, dict[str, Any]]:
        count = len(server.get("/api/nodes").json()["nodes"])
        lookers = {f"looker-{number}": "" for number in range(count)}
        for user in lookers:
            lookers[user] = server.submit(user, LOOK + "open('results.jsonl', 'w').close()\n" + HOLD)
        for user, job_id in lookers.items():
            server.wait_for_output(job_id, user, "held\n", timeout=60)
        release(server, self.fleet, *lookers.values())
        found = {}
        for user, job_id in lookers.items():
            server.wait_for(job_id, user, timeout=60)
            ended = server.results(job_id, user)
            assert ended["status"] == "completed", ended
            found[ended["node_id"]] = Answer("completed", None, 0, "", ended["stdout"]).report
        assert len(found) == count, "each node ran one honest job"
        return found


def seconds_of(ended: dict[str, Any]) -> float:
    """From the (last) start to the end."""
    start, end = (datetime.fromisoformat(ended[name].replace("Z", "+00:00")) for name in ("started_at", "completed_at"))
    return (end - start).total_seconds()


def resident(server: Server) -> int:
    """Bytes of memory that the server process holds."""
    assert server.process is not None
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) << 10


@pytest.fixture(scope="module")
def nodes() -> Iterator[Fleet]:
    """Nodes of this file alone: their agents are killed."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    with Fleet(NODES) as fleet:
        yield fleet


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, nodes: Fleet) -> Iterator[Place]:
    """One place, with every attack run there."""
    with ExitStack() as stack:
        yield Place(request.param, None if request.param == "embedded" else nodes, stack)


def memory_is_limited(place: Place) -> bool:
    """Whether the nodes found a control group to hold it with."""
    (held,) = {node["memory_limit"] for node in place.server.get("/api/nodes", ADMIN).json()["nodes"]}
    return bool(held)


def expected(attack: Attack, place: Place) -> set[str]:
    """What documentation/SECURITY.md says of the attack in that place."""
    if attack.uses_gpu or (33 in attack.rows and not memory_is_limited(place)):
        return {NOT_APPLICABLE}
    if attack.needs_sandbox and place.kind == "ssh, bare":
        return {NOT_CONTAINED}
    return {CONTAINED}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.rows[0]}-{attack.name.replace(' ', '-')}")
def test_attack_ends_as_documented_and_an_honest_job_follows(place: Place, attack: Attack) -> None:
    trial = place.trials[attack.name]
    judgement = weigh(attack, trial.answer, trial.looked)
    assert judgement.outcome in expected(attack, place), (judgement, trial)


def test_every_attack_has_one_end(place: Place) -> None:
    for name, trial in place.trials.items():
        final = [event for event in trial.events if event["to_status"] in ("completed", "failed", "cancelled")]
        assert len(final) == 1, (name, trial.events)


def test_output_without_end_costs_the_server_no_memory(place: Place) -> None:
    assert place.memory_after - place.memory_before < 96 << 20


def test_ugly_output_is_kept_to_the_byte(place: Place) -> None:
    (attack,) = [attack for attack in ATTACKS if 28 in attack.rows]
    raw = place.trials[attack.name].raw
    assert raw.startswith(b"\x00\xff\xfe\xc3\x28\xed\xa0\x80\n\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m\n<script>")


def test_nothing_of_the_attacks_is_left_in_the_nodes_folders(place: Place) -> None:
    roots = list(place.server.jobs_dir.glob(".nodes/*/*"))
    for node in place.fleet.nodes if place.fleet else []:
        roots += [path for path in node.home.glob(".gpu-job-server/*/node-*")]
    assert roots

    def left() -> list[str]:
        return [name for root in roots for folder in ("attempts", "trash") for name in os.listdir(root / folder)]

    wait_until(lambda: not left(), 60, "the nodes to clear everything away")


def test_two_hundred_submissions_at_once_are_one_job(place: Place) -> None:
    server, user = place.server, user_of(ATTACKS[0])
    config = server.config(user, expected_time=30)

    def submit(_: int) -> requests.Response:
        return server.post(HOLD, config)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(submit, range(200)))
    taken = [answer.json()["job_id"] for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(taken) == 1
    release(server, place.fleet, *taken)
    assert server.wait_for(taken[0], user)["status"] == "completed"


# -- row 39: cancelled at each stage of its life, and in the instant it ends ---------------------------------------


@pytest.mark.parametrize("stage", ["just submitted", "starting", "running", "ending"])
def test_job_cancelled_at_a_stage_of_its_life_has_one_end(place: Place, stage: str) -> None:
    server, user = place.server, user_of(ATTACKS[1])
    for _ in range(3):
        job_id = server.submit(user, HOLD if stage != "ending" else "print('over')\n")
        if stage == "starting":
            server.wait_for(job_id, user, ("running",))
        elif stage == "running":
            server.wait_for_output(job_id, user, "held\n", timeout=60)
        elif stage == "ending":
            server.wait_for(job_id, user, ("running", "completed"))
        code = server.cancel(job_id, user).status_code
        status = server.wait_for(job_id, user, timeout=60)["status"]
        assert (status, code) in {("cancelled", 200), ("cancelled", 202), ("completed", 400), ("completed", 200)}
        assert status == "cancelled" or stage == "ending"
        final = [event for event in server.events(job_id, user) if event["to_status"] in ("completed", "cancelled")]
        assert len(final) == 1


# -- rows 35 to 38, 41 and 42: hostile requests --------------------------------------------------------------------


def assert_honest(place: Place | Server) -> None:
    """An honest job goes well."""
    server = place.server if isinstance(place, Place) else place
    answer = server.run_job("honest", "print('as ever')\n")
    assert (answer["status"], answer["stdout"]) == ("completed", "as ever\n"), answer


def test_hostile_ids_and_configs_write_nothing(place: Place) -> None:
    server = place.server
    before = sorted(os.listdir(server.jobs_dir)), len(server.get("/api/jobs?limit=500", ADMIN).json()["jobs"])
    for value in HOSTILE_IDS.values():
        for name in ("user_id", "competition_id", "project_id"):
            assert server.post("pass\n", {**server.config("alice"), name: value}).status_code == 400
    for config in HOSTILE_CONFIGS.values():
        assert server.post("pass\n", config(server)).status_code == 400
    after = sorted(os.listdir(server.jobs_dir)), len(server.get("/api/jobs?limit=500", ADMIN).json()["jobs"])
    assert after == before
    assert_honest(place)


def test_ids_that_join_to_one_name_keep_two_results(place: Place) -> None:
    server = place.server
    jobs = [
        (server.submit(user, f"print('of {user}')\n", competition_id=competition), user)
        for user, competition in (("a_b", "c"), ("a", "b_c"))
    ]
    for job_id, user in jobs:
        server.wait_for(job_id, user, timeout=60)
    ended = [server.results(job_id, user) for job_id, user in jobs]
    assert [result["results"] for result in ended] == [[{"output": "of a_b"}], [{"output": "of a"}]]
    assert len({result["result_file"] for result in ended}) == 2
    assert_honest(place)


def test_strange_code_has_its_defined_end(place: Place) -> None:
    server = place.server
    jobs = {
        name: (server.submit(f"coder-{number}", code), f"coder-{number}")
        for number, (name, (code, _, _)) in enumerate(CODES.items())
    }
    for name, (job_id, user) in jobs.items():
        _, expected, text = CODES[name]
        server.wait_for(job_id, user, timeout=60)
        ended = server.results(job_id, user)
        assert (ended["status"], ended["failure_reason"]) == expected, ended
        assert text in ended["stdout"] + ended["stderr"]
    assert server.post(b"#" * (100 << 20), server.config("alice")).status_code == 413
    assert_honest(place)


def test_half_a_body_is_ended_in_bounded_time_and_queues_nothing(place: Place) -> None:
    server = place.server
    before = len(server.get("/api/jobs?limit=500", ADMIN).json()["jobs"])
    head = b"POST /api/submit HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(head + b"Content-Length: 500\r\n\r\n--B\r\nContent-Disposition: form-data; na")
        answer = b""
        while data := client.recv(1 << 16):  # up to the server's closing the connection
            answer += data
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert len(server.get("/api/jobs?limit=500", ADMIN).json()["jobs"]) == before
    assert_honest(place)


def test_ten_thousand_guesses_are_slowed_counted_and_told_and_cost_others_nothing() -> None:
    """Once, on this machine's slots: no node has a part in it."""
    with Server({"NUM_GPU_NODES": "1", "SUBMITS_PER_MINUTE": "10000"}) as server:
        make_tokens(server, ["honest"], admin=ADMIN)
        assert_honest(server)  # from here these tokens are known to come from this address
        assert server.get("/api/jobs", ADMIN).status_code == 200
        guesses = 2500

        def guess(caller: int) -> list[bytes]:
            """Many requests in a row on one connection; the status of each."""
            found = b""
            with socket.create_connection(("127.0.0.1", server.port), 100) as client:
                for start in range(0, guesses, 50):
                    client.sendall(
                        b"".join(
                            b"GET /api/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer guess-%d-%d\r\n\r\n"
                            % (caller, number)
                            for number in range(start, start + 50)
                        )
                    )
                    while found.count(b"HTTP/1.1 ") < start + 50 or not found.endswith(b"}"):
                        found += client.recv(1 << 20)
            return re.findall(rb"HTTP/1\.1 (\d+) ", found)

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(guess, caller) for caller in range(4)]
            assert_honest(server)
            statuses = [status for caller in callers for status in caller.result()]
        assert len(statuses) == 4 * guesses
        # A window is a minute: a slow machine sees more than one.
        assert 0 < statuses.count(b"401") <= 600
        assert statuses.count(b"429") == len(statuses) - statuses.count(b"401")
        counted = re.search(r'^\w*limit\w*\{limit="login"\} (\S+)$', server.get("/metrics").text, re.MULTILINE)
        assert counted is not None
        assert float(counted[1]) >= statuses.count(b"429")
        entries = server.get("/api/admin/audit?limit=500", ADMIN).json()["entries"]
        told = [entry for entry in entries if entry["action"] == "login_refused"]
        assert 1 <= len(told) <= 40
        assert_honest(server)


# -- row 31: what cannot be killed ---------------------------------------------------------------------------------


@pytest.fixture
def freezer(tmp_path: Path) -> Iterator[Path]:
    """A group of processes that the kernel can freeze so that not even SIGKILL ends them."""
    if os.geteuid() != 0:
        pytest.skip("freezing processes needs root")
    top = Path("/sys/fs/cgroup/freezer")
    mounted = None
    if not (top / "cgroup.procs").exists():
        mounted = top = tmp_path / "freezer"
        top.mkdir()
        done = subprocess.run(["mount", "-t", "cgroup", "-o", "freezer", "none", str(top)], capture_output=True)
        if done.returncode:
            pytest.skip("this kernel cannot freeze processes")
    group = Path(tempfile.mkdtemp(prefix="attack-", dir=top))
    try:
        yield group
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (group / "cgroup.procs").read_text().strip(), 30, "the frozen processes to end")
        group.rmdir()
        if mounted is not None:
            subprocess.run(["umount", str(mounted)], check=True)


def test_process_that_cannot_be_killed_ends_the_job_and_quarantines_the_node(nodes: Fleet, freezer: Path) -> None:
    entries = json.loads(nodes.settings()["GPU_NODES"])
    settings = {**SETTINGS, **nodes.settings(), "GPU_NODES": json.dumps(entries[:1]), "SANDBOX": "off"}
    with Server({**settings, "QUARANTINE_SECONDS": "1", "NODE_PROBE_INTERVAL": "1"}) as server:
        make_tokens(server, ["stuck", "honest"], admin=ADMIN)
        code = "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(600)\nprint(f'pid {pid}')\n" + HOLD
        job_id = server.submit("stuck", code)
        server.wait_for_output(job_id, "stuck", "held\n", timeout=60)
        pid = int(server.get(f"/api/logs/{job_id}", "stuck").text.split("pid ")[1].split()[0])
        (freezer / "cgroup.procs").write_text(str(pid))
        (freezer / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (freezer / "freezer.state").read_text().strip() == "FROZEN", 20, "the process to be frozen")
        release(server, nodes, job_id)
        assert server.wait_for(job_id, "stuck", timeout=60)["status"] == "completed"

        def node() -> dict[str, Any]:
            found: dict[str, Any] = server.get("/api/nodes", ADMIN).json()["nodes"][0]
            return found

        seen = wait_until(lambda: (found := node())["status"] == "quarantined" and found, 20, "the quarantine")
        assert seen["reason"].startswith(f"1 processes of job {job_id} could not be ended")
        waiting = server.submit("honest")
        # Neither time nor a restart of the server ends the quarantine while the process is there.
        proof = f"1 processes of job {job_id} could not be ended and are still there (process {pid}, state D)"
        wait_until(lambda: node()["reason"] == proof, 30, "a look to find it")
        server.kill()
        server.start()
        later = time.monotonic() + 3
        wait_until(lambda: time.monotonic() > later, 20, "the quarantine's time to pass, with looks")
        assert (node()["status"], node()["reason"]) == ("quarantined", proof)
        assert server.status(waiting, "honest")["status"] == "pending"
        (freezer / "freezer.state").write_text("THAWED")
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 20, "the process to be gone")
        assert server.wait_for(waiting, "honest", timeout=60)["status"] == "completed"
        assert node()["status"] == "online"
