"""Many users and eight nodes: who waits, who runs where, which limits hold, and what others may see of it."""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.fleet import Fleet
from tests.held_jobs import HOLD, make_tokens, release
from tests.server import Server, wait_until

NODES = 8
STUDENTS = [f"student-{number}" for number in range(1, 12)]
ADMIN = "the-admin"
NODE_IDS = {f"node-{number}" for number in range(1, NODES + 1)}


@pytest.fixture(scope="module")
def eight_nodes(fleet: Fleet) -> Iterator[Server]:
    """A server on eight SSH nodes, without a rate limit to speak of."""
    with Server({"SUBMITS_PER_MINUTE": "10000", "KILL_GRACE": "1", **fleet.settings()}) as running:
        make_tokens(running, STUDENTS, admin=ADMIN)
        yield running


@pytest.fixture
def server(eight_nodes: Server) -> Iterator[Server]:
    """The server with nothing queued and every node in use; what a test left is cleared away."""
    yield eight_nodes
    clear(eight_nodes)
    for node in admin_nodes(eight_nodes).values():
        if node["status"] == "draining":
            steer(eight_nodes, node["node_id"], "resume")


@pytest.fixture(scope="module")
def limited_server() -> Iterator[Server]:
    """A server with the default limits, on this machine."""
    with Server({"KILL_GRACE": "1", "NUM_GPU_NODES": "2"}) as running:
        make_tokens(running, STUDENTS[:6], admin=ADMIN)
        yield running


@pytest.fixture
def limited(limited_server: Server) -> Iterator[Server]:
    """It, with nothing left running afterwards. Windows of a minute stay, so each test uses users of its own."""
    yield limited_server
    clear(limited_server)


# -- small things --------------------------------------------------------------------------------------------------


def clear(server: Server) -> None:
    """Cancel everything: what waits first, so that it does not start when a node is freed."""
    for state in ("pending", "running"):
        found = server.get(f"/api/jobs?status={state}", ADMIN).json()["jobs"]
        if found:
            with ThreadPoolExecutor(len(found)) as pool:
                list(pool.map(lambda job: server.cancel(job["job_id"], ADMIN), found))
    wait_until(lambda: not any(node["is_busy"] for node in admin_nodes(server).values()), 40, "all nodes to be idle")


def seconds(stamp: str) -> float:
    """Seconds since the epoch of a time in an answer."""
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def admin_nodes(server: Server) -> dict[str, dict[str, Any]]:
    """The nodes by id, as an admin sees them."""
    return {node["node_id"]: node for node in server.get("/api/nodes", ADMIN).json()["nodes"]}


def steer(server: Server, node_id: str, what: str, user_id: str = ADMIN) -> requests.Response:
    """Drain or resume a node."""
    url = f"{server.url}/api/admin/nodes/{node_id}/{what}"
    return requests.post(url, headers=server.bearer(user_id), timeout=30)


def started(server: Server, job_id: str, user_id: str) -> dict[str, Any]:
    """The job's status once its first process runs."""

    def look() -> dict[str, Any] | None:
        status = server.status(job_id, user_id)
        return status if status["started_at"] is not None else None

    found: dict[str, Any] = wait_until(look, 40, f"job {job_id} of {user_id} to start")
    return found


def occupy(server: Server, users: Iterable[str], **fields: Any) -> dict[str, dict[str, Any]]:
    """One held job for each user; their statuses once all run."""
    jobs = {user: server.submit(user, HOLD, **fields) for user in users}
    return {user: started(server, job_id, user) for user, job_id in jobs.items()}


def at_once(number: int, call: Callable[[int], requests.Response]) -> list[requests.Response]:
    """Call from that many threads, which all begin at the same moment."""
    gate = threading.Barrier(number)

    def run(index: int) -> requests.Response:
        gate.wait(60)
        return call(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def words_of(value: Any) -> Iterator[str]:
    """Every text in an answer, names included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from words_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from words_of(inner)
    elif isinstance(value, str):
        yield value


# -- places and estimates ------------------------------------------------------------------------------------------


def test_eight_run_on_eight_nodes_and_the_ninth_starts_when_one_is_free(server: Server, fleet: Fleet) -> None:
    expected = {user: 200.0 + 100 * index for index, user in enumerate(STUDENTS[:NODES])}
    shortest, second = "student-5", "student-3"
    expected[shortest], expected[second] = 60.0, 120.0
    jobs = {user: server.submit(user, HOLD, expected_time=time) for user, time in expected.items()}
    running = {user: started(server, job_id, user) for user, job_id in jobs.items()}
    assert {status["node_id"] for status in running.values()} == NODE_IDS
    assert {status["status"] for status in running.values()} == {"running"}
    for user, status in running.items():
        assert (status["queue_position"], status["estimated_start"]) == (None, None)
        assert seconds(status["estimated_finish"]) == pytest.approx(
            seconds(status["started_at"]) + expected[user], abs=0.1
        )

    ninth = server.post(HOLD, server.config("student-9", expected_time=70)).json()
    tenth = server.post(HOLD, server.config("student-10", expected_time=80)).json()
    first_free = seconds(running[shortest]["started_at"]) + 60
    for answer in (ninth, server.status(ninth["job_id"], "student-9")):
        assert (answer["status"], answer["node_id"], answer["queue_position"]) == ("pending", None, 1)
        assert seconds(answer["estimated_start"]) == pytest.approx(first_free, abs=2)
        assert seconds(answer["estimated_finish"]) == pytest.approx(first_free + 70, abs=2)
    for answer in (tenth, server.status(tenth["job_id"], "student-10")):
        assert (answer["status"], answer["queue_position"]) == ("pending", 2)
        assert seconds(answer["estimated_start"]) == pytest.approx(seconds(running[second]["started_at"]) + 120, abs=2)

    release(server, fleet, jobs[shortest])
    ended = server.wait_for(jobs[shortest], shortest)
    now_running = started(server, ninth["job_id"], "student-9")
    assert ended["status"] == "completed"
    assert now_running["node_id"] == ended["node_id"]
    assert 0 <= seconds(now_running["started_at"]) - seconds(ended["completed_at"]) < 1
    assert (now_running["queue_position"], now_running["estimated_start"]) == (None, None)
    assert server.status(tenth["job_id"], "student-10")["queue_position"] == 1
    eleventh = server.post(HOLD, server.config("student-11")).json()
    assert (eleventh["status"], eleventh["queue_position"]) == ("pending", 2)

    others = [job_id for user, job_id in jobs.items() if user != shortest]
    release(server, fleet, *others, *(answer["job_id"] for answer in (ninth, tenth, eleventh)))
    for user, job_id in {
        **jobs,
        **{answer["user_id"]: answer["job_id"] for answer in (ninth, tenth, eleventh)},
    }.items():
        assert server.wait_for(job_id, user)["status"] == "completed"


def test_jobs_start_in_the_order_they_came(server: Server, fleet: Fleet) -> None:
    keep = STUDENTS[:2]
    for node_id in sorted(NODE_IDS)[2:]:
        steer(server, node_id, "drain")
    running = occupy(server, keep)
    waiting = [(user, server.submit(user, "pass\n")) for user in STUDENTS[2:8]]
    places = [server.status(job_id, user)["queue_position"] for user, job_id in waiting]
    assert places == [1, 2, 3, 4, 5, 6]
    cancelled_user, cancelled = waiting.pop(1)
    assert server.cancel(cancelled, cancelled_user).status_code == 200
    assert [server.status(job_id, user)["queue_position"] for user, job_id in waiting] == [1, 2, 3, 4, 5]
    release(server, fleet, running[keep[0]]["job_id"])  # the other one stays: all go through one node
    done = [server.wait_for(job_id, user) for user, job_id in waiting]
    assert {status["node_id"] for status in done} == {running[keep[0]]["node_id"]}
    starts = [status["started_at"] for status in done]
    assert starts == sorted(starts)


def test_without_a_node_in_use_there_is_no_estimate(server: Server) -> None:
    for node_id in NODE_IDS:
        steer(server, node_id, "drain")
    answer = server.post("pass\n", server.config("student-1")).json()
    assert (answer["status"], answer["queue_position"]) == ("pending", 1)
    assert (answer["estimated_start"], answer["estimated_finish"]) == (None, None)
    assert "no node takes jobs" in answer["message"]
    listed = server.get("/api/nodes").json()
    assert (listed["queue_length"], listed["running_jobs"], listed["expected_wait"]) == (1, 0, None)
    assert any("no node takes jobs" in warning for warning in server.get("/readyz").json()["warnings"])
    steer(server, "node-6", "resume")
    assert server.wait_for(answer["job_id"], "student-1")["node_id"] == "node-6"


# -- which node ----------------------------------------------------------------------------------------------------


def settled(server: Server, job_id: str, user_id: str) -> dict[str, Any]:
    """The job's status once it has ended and its node has noticed."""
    status = server.wait_for(job_id, user_id)
    wait_until(lambda: not admin_nodes(server)[status["node_id"]]["is_busy"], 30, "the node to be idle")
    return status


def test_node_whose_job_failed_is_used_last(server: Server, fleet: Fleet) -> None:
    failed = settled(server, server.submit("student-1", "raise SystemExit(1)\n"), "student-1")
    assert failed["failure_reason"] == "exit_code"
    used = [settled(server, server.submit("student-1", "pass\n"), "student-1")["node_id"] for _ in range(NODES - 1)]
    # Each of the others in turn, the longest idle first; and then those again.
    assert sorted(used) == sorted(NODE_IDS - {failed["node_id"]})
    again = [settled(server, server.submit("student-1", "pass\n"), "student-1")["node_id"] for _ in range(2)]
    assert again == used[:2]
    # With all others busy it is used all the same, and a job that goes well there is its way back.
    occupied = occupy(server, STUDENTS[: NODES - 1])
    assert {status["node_id"] for status in occupied.values()} == NODE_IDS - {failed["node_id"]}
    last = settled(server, server.submit("student-9", "pass\n"), "student-9")
    assert (last["node_id"], last["status"]) == (failed["node_id"], "completed")
    release(server, fleet, *(status["job_id"] for status in occupied.values()))
    for user, status in occupied.items():
        settled(server, status["job_id"], user)
    back = [settled(server, server.submit("student-1", "pass\n"), "student-1")["node_id"] for _ in range(NODES)]
    assert failed["node_id"] in back


def test_drained_node_gets_nothing_until_it_is_resumed(server: Server) -> None:
    assert steer(server, "node-4", "drain", "student-1").status_code == 403
    assert steer(server, "node-99", "drain").status_code == 404
    assert admin_nodes(server)["node-4"]["status"] == "online"
    answer = steer(server, "node-4", "drain")
    assert (answer.status_code, answer.json()["status"]) == (200, "draining")
    running = occupy(server, STUDENTS[: NODES - 1])
    assert {status["node_id"] for status in running.values()} == NODE_IDS - {"node-4"}
    waiting = server.submit("student-8", HOLD)
    assert server.status(waiting, "student-8")["queue_position"] == 1
    node = admin_nodes(server)["node-4"]
    assert (node["status"], node["is_busy"], node["job_id"]) == ("draining", False, None)
    assert ADMIN in node["reason"]
    answer = steer(server, "node-4", "resume")
    assert (answer.status_code, answer.json()["status"]) == (200, "online")
    assert started(server, waiting, "student-8")["node_id"] == "node-4"


def test_draining_lets_the_running_job_finish_and_outlives_a_restart(server: Server, fleet: Fleet) -> None:
    running = occupy(server, ["student-1"])["student-1"]
    node_id = running["node_id"]
    answer = steer(server, node_id, "drain").json()
    assert answer["status"] == "draining"
    assert "finishes" in answer["message"]
    assert server.terminate() == 0
    server.start()
    node = wait_until(lambda: admin_nodes(server)[node_id], 30)
    assert (node["status"], node["is_busy"], node["job_id"]) == ("draining", True, running["job_id"])
    assert server.status(running["job_id"], "student-1")["status"] == "running"
    release(server, fleet, running["job_id"])
    done = settled(server, running["job_id"], "student-1")
    assert (done["status"], done["node_id"], done["attempt"]) == ("completed", node_id, 1)
    others = occupy(server, STUDENTS[: NODES - 1])
    assert {status["node_id"] for status in others.values()} == NODE_IDS - {node_id}
    waiting = server.submit("student-8", "pass\n")
    assert server.status(waiting, "student-8")["status"] == "pending"
    assert steer(server, node_id, "resume").json()["status"] == "online"
    assert server.wait_for(waiting, "student-8")["node_id"] == node_id


# -- one active job per user ---------------------------------------------------------------------------------------


def sort_out(responses: list[requests.Response]) -> Counter[str]:
    """Which answers came; each must be one of the three that may."""
    kinds: Counter[str] = Counter()
    for response in responses:
        answer = response.json()
        if response.status_code == 200:
            kinds["taken"] += 1
            continue
        assert response.status_code == 429, answer
        assert response.headers["Content-Type"] == "application/problem+json"
        assert int(response.headers["Retry-After"]) >= 1
        if answer["detail"].startswith("Rate limit exceeded"):
            kinds["rate"] += 1
            assert response.headers["X-RateLimit-Limit"] == "5"
            assert response.headers["X-RateLimit-Remaining"] == "0"
            assert int(response.headers["X-RateLimit-Reset"]) > time.time() - 60
            assert int(response.headers["Retry-After"]) <= 60
        else:
            assert answer["detail"].startswith("Queue limit exceeded")
            kinds["active"] += 1
    return kinds


def test_two_hundred_submissions_at_once_are_one_job(server: Server) -> None:
    config = server.config("student-1")
    responses = at_once(200, lambda _: server.post(HOLD, config))
    assert sort_out(responses) == {"taken": 1, "active": 199}
    jobs = server.get("/api/jobs?limit=500", "student-1").json()["jobs"]
    active = [job["job_id"] for job in jobs if job["status"] in ("pending", "running")]
    taken = next(response.json()["job_id"] for response in responses if response.status_code == 200)
    assert active == [taken]
    assert server.post(HOLD, server.config("student-2")).status_code == 200
    # When it has ended, the next one is taken.
    started(server, taken, "student-1")
    assert server.cancel(taken, "student-1").status_code == 200
    assert server.run_job("student-1")["status"] == "completed"


def test_rate_limit_lets_five_of_two_hundred_through_and_spares_others(limited: Server) -> None:
    config, other = limited.config("student-1"), limited.config("student-2")
    responses = at_once(201, lambda index: limited.post(HOLD, other if index == 100 else config))
    assert responses.pop(100).status_code == 200
    kinds = sort_out(responses)
    assert kinds["taken"] == 1
    assert kinds["active"] == 4
    assert kinds["rate"] == 195
    taken = next(response for response in responses if response.status_code == 200)
    assert taken.headers["X-RateLimit-Limit"] == "5"
    started(limited, taken.json()["job_id"], "student-1")
    # A restart empties the window; that the user has an active job is in the database.
    assert limited.terminate() == 0
    limited.start()
    after = [limited.post(HOLD, config) for _ in range(6)]
    assert sort_out(after) == {"active": 5, "rate": 1}
    assert after[-1].json()["detail"].startswith("Rate limit exceeded")
    jobs = limited.get("/api/jobs", "student-1").json()["jobs"]
    assert [(job["job_id"], job["status"]) for job in jobs] == [(taken.json()["job_id"], "running")]


# -- Idempotency-Key -----------------------------------------------------------------------------------------------


def test_repeats_of_one_key_get_the_first_answer(limited: Server) -> None:
    config, code = limited.config("student-3"), "print('only once')\n"

    def send(key: str, code: str = code, config: dict[str, Any] = config) -> requests.Response:
        return limited.post(code, config, headers={"Idempotency-Key": key})

    responses = at_once(20, lambda _: send("first"))
    assert [response.status_code for response in responses] == [200] * 20
    (job_id,) = {response.json()["job_id"] for response in responses}
    assert Counter(response.headers.get("Idempotency-Replayed") for response in responses) == {None: 1, "true": 19}
    assert {response.headers["Location"] for response in responses} == {f"/api/status/{job_id}"}
    other = send("first", code="print('something else')\n")
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["detail"]
    assert send("first", config={**config, "project_id": "another"}).status_code == 422

    assert limited.wait_for(job_id, "student-3")["status"] == "completed"
    late = send("first")
    assert (late.status_code, late.json()["job_id"], late.json()["status"]) == (200, job_id, "completed")
    waited = limited.post(code, config, headers={"Idempotency-Key": "first"}, wait=30).json()
    assert (waited["job_id"], waited["stdout"]) == (job_id, "only once\n")
    assert len(limited.get("/api/jobs", "student-3").json()["jobs"]) == 1
    # The repeats took nothing from the rate; another key is another job, and another user's key another user's.
    fresh = send("second")
    assert fresh.json()["job_id"] != job_id
    assert fresh.headers["X-RateLimit-Remaining"] == "3"
    theirs = send("first", config=limited.config("student-4"))
    assert (theirs.status_code, theirs.headers.get("Idempotency-Replayed")) == (200, None)
    assert theirs.json()["job_id"] != job_id


def test_repeat_of_a_refused_submission_is_tried_anew(limited: Server) -> None:
    config = limited.config("student-5")
    held = limited.submit("student-5", HOLD)
    headers = {"Idempotency-Key": "refused-at-first"}
    assert limited.post("pass\n", config, headers=headers).status_code == 429
    started(limited, held, "student-5")
    limited.cancel(held, "student-5")
    taken = limited.post("pass\n", config, headers=headers)
    assert (taken.status_code, taken.headers.get("Idempotency-Replayed")) == (200, None)


# -- what others see -----------------------------------------------------------------------------------------------


def test_public_list_of_nodes_names_no_host_user_or_job(server: Server, fleet: Fleet) -> None:
    running = occupy(server, STUDENTS[:3])
    waiting = [server.submit(user, HOLD) for user in STUDENTS[3:10]]
    wait_until(lambda: server.get("/api/nodes").json()["running_jobs"] == NODES, 40, "all nodes to be busy")
    secrets = {node.host for node in fleet.nodes} | {node.user for node in fleet.nodes} | set(STUDENTS)
    secrets |= {str(node.port) for node in fleet.nodes} | set(waiting) | {job["job_id"] for job in running.values()}
    secrets |= {str(node.home) for node in fleet.nodes}
    for answer in (server.get("/api/nodes"), server.get("/api/nodes", "student-1"), server.get("/readyz")):
        assert answer.status_code == 200
        shown = "\n".join(words_of(answer.json()))
        assert [secret for secret in secrets if secret in shown] == []
    public = server.get("/api/nodes").json()
    assert {node["node_id"] for node in public["nodes"]} == NODE_IDS
    assert {(node["status"], node["is_busy"]) for node in public["nodes"]} == {("busy", True)}
    assert {node["gpu_model"] for node in public["nodes"]} == {"Stand-in GPU"}
    assert {node["gpu_memory_total_mib"] for node in public["nodes"]} == {40960}
    assert {node["gpu_temperature"] for node in public["nodes"]} == {31}
    assert (public["queue_length"], public["running_jobs"]) == (2, 8)
    assert 0 < public["expected_wait"] <= 60
    assert server.get("/api/nodes", headers={"Authorization": "Bearer wrong"}).status_code == 401

    seen = admin_nodes(server)
    for user, job in running.items():
        node = seen[job["node_id"]]
        assert (node["job_id"], node["user_id"]) == (job["job_id"], user)
        assert node["sandbox"] is not None
    assert {node["address"] for node in seen.values()} == {node.address for node in fleet.nodes}


def test_dashboard_shows_a_user_the_own_jobs_and_an_admin_all(server: Server) -> None:
    server.run_job("student-2", "raise SystemExit(1)\n")
    mine = server.run_job("student-1")["job_id"]
    running = occupy(server, STUDENTS[:2])
    promised = {
        *("timestamp", "user_id", "is_admin", "job_statistics", "user_statistics", "node_statistics"),
        *("queue_information", "active_jobs", "recent_jobs", "health_metrics"),
    }

    response = server.get("/api/dashboard", "student-1")
    own = response.json()
    assert promised <= set(own)
    assert (own["user_id"], own["is_admin"], own["user_statistics"]) == ("student-1", False, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", own["timestamp"])
    assert abs(seconds(own["timestamp"]) - time.time()) < 30
    assert [job["job_id"] for job in own["active_jobs"]] == [running["student-1"]["job_id"]]
    assert [job["job_id"] for job in own["recent_jobs"]][:2] == [running["student-1"]["job_id"], mine]
    assert {job["user_id"] for job in own["recent_jobs"]} == {"student-1"}
    assert "student-2" not in response.text
    jobs = server.get("/api/jobs?limit=500", "student-1").json()["jobs"]
    counted = Counter(job["status"] for job in jobs)
    assert own["job_statistics"]["total"] == len(jobs)
    assert {state: own["job_statistics"][state] for state in counted} == counted

    everything = server.get("/api/dashboard", ADMIN).json()
    assert promised <= set(everything)
    assert (everything["user_id"], everything["is_admin"]) == (ADMIN, True)
    assert {job["user_id"] for job in everything["active_jobs"]} == {"student-1", "student-2"}
    by_user = {entry["user_id"]: entry for entry in everything["user_statistics"]}
    assert (by_user["student-1"]["active_jobs"], by_user["student-1"]["jobs"]) == (1, len(jobs))
    assert everything["node_statistics"] == {
        **{"total": 8, "online": 6, "busy": 2},
        **{"offline": 0, "draining": 0, "quarantined": 0},
    }
    assert everything["queue_information"] == {"queue_length": 0, "running_jobs": 2, "expected_wait": 0.0}
    assert everything["health_metrics"]["usable_nodes"] == 8
    assert server.get("/api/dashboard").status_code == 401
    assert json.dumps(everything).count(server.token("student-1")) == 0
