"""Why a job waits and when it will run: the sentence, the range, what it is learned from, and what it gives away."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimates import SAMPLES, Line, Range, RunTimes, remaining, why_pending
from tests.server import Server, wait_until

LONG = "import time; time.sleep(60)\n"


def seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


# -- what is learned -----------------------------------------------------------------------------------------------


def test_without_experience_a_job_takes_what_it_declares_and_anything_up_to_its_limit() -> None:
    known = RunTimes()
    for ratio in (0.1, 0.1):
        known.learn("alice", "comp", ratio)
    assert known.seconds("alice", "comp", 60, 120) == Range(0, 60, 120)


def test_of_three_jobs_on_the_competition_counts_before_the_user() -> None:
    known = RunTimes()
    for ratio in (0.5, 0.25, 1.0):
        known.learn("alice", "comp", ratio)
    assert known.seconds("alice", "comp", 60, 120) == Range(15, 30, 60)
    assert known.seconds("alice", "other", 100, 200) == Range(25, 50, 100)
    assert known.seconds("bob", "comp", 60, 120) == Range(0, 60, 120)
    for ratio in (3.0, 3.0, 3.0):
        known.learn("alice", "other", ratio)
    assert known.seconds("alice", "other", 60, 120) == Range(120, 120, 120)  # never beyond the limit
    assert known.seconds("alice", "comp", 60, 120) == Range(15, 30, 60)


def test_one_outlier_among_many_does_not_widen_the_range_and_old_jobs_are_forgotten() -> None:
    known = RunTimes()
    for ratio in (*[0.5] * (SAMPLES - 1), 2.0):
        known.learn("alice", "comp", ratio)
    assert known.seconds("alice", "comp", 100, 200) == Range(50, 50, 50)
    for _ in range(SAMPLES):
        known.learn("alice", "comp", 1.0)
    assert known.seconds("alice", "comp", 100, 200) == Range(100, 100, 100)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estimates.KEYS_MOST", 10)
    known = RunTimes()
    for user, _ in itertools.product(range(50), range(3)):
        known.learn(f"user{user}", "comp", 0.5)
    assert known.seconds("user49", "comp", 60, 120).likely == 30
    assert known.seconds("user0", "comp", 60, 120).likely == 60
    assert len(known._samples) == len(known._ranges) == 10


def test_a_job_that_outlives_all_experience_ends_between_now_and_its_limit() -> None:
    run = Range(10, 20, 30)
    assert remaining(run, 100, 5) == Range(5, 15, 25)
    assert remaining(run, 100, 40) == Range(0, 30, 60)
    assert remaining(run, 100, 150) == Range(0, 0, 0)


TIMES = st.integers(0, 50)
RANGES = st.tuples(TIMES, TIMES, TIMES).map(lambda found: Range(*map(float, sorted(found))))


@given(st.lists(RANGES, max_size=15), st.lists(RANGES, min_size=1, max_size=5))
def test_the_likely_start_lies_in_its_range(runs: list[Range], free_in: list[Range]) -> None:
    line = Line(free_in, list(enumerate(runs)))
    for when in (*(line.place(key)[1] for key in range(len(runs))), line.newcomer):
        assert when is not None
        assert when.low <= when.likely <= when.high


@given(st.lists(RANGES, max_size=15), st.lists(RANGES, max_size=5), st.integers(0, 15))
def test_a_job_that_is_added_stands_where_it_would_have_stood(
    runs: list[Range], free_in: list[Range], known: int
) -> None:
    pending = list(enumerate(runs))
    whole, grown = Line(free_in, pending), Line(free_in, pending[:known])
    for key, run in pending:  # those that are there are passed over
        grown.add(key, run)
    assert len(grown) == len(whole) == len(runs)
    assert grown.newcomer == whole.newcomer
    for key in range(-1, len(runs) + 1):
        assert grown.place(key) == whole.place(key)


# -- the sentence --------------------------------------------------------------------------------------------------


def test_the_sentence_names_what_there_is_to_name() -> None:
    assert why_pending(1, Range(0, 40, 90), ("node-3", 40.2), "") == (
        "Waiting for a node: next; node-3 is free first, in about 40 s; expected to start in about 40 s (0 s to 90 s)."
    )
    assert why_pending(
        4, Range(300, 600, 9000), ("node-1", 0.0), "of 8 nodes 1 drained", retry_in=7.6, avoid_node="node-2"
    ) == (
        "Waiting for a node: 3 ahead; node-1 is free; it is tried again in about 8 s; not on node-2 if another node is "
        "there, because it failed there; of 8 nodes 1 drained; expected to start in about 10 min (5 min to 2.5 h)."
    )
    assert why_pending(1, None, None, "of 2 nodes 2 out of reach") == (
        "Waiting: no node takes jobs at the moment (of 2 nodes 2 out of reach)."
    )


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Server]:
    """Two slots and a third that is drained."""
    with Server({"NUM_GPU_NODES": "3", "SUBMITS_PER_MINUTE": "10000"}) as running:
        running.run("main.py", "drain", "local-3")
        wait_until(lambda: "draining" in [node["status"] for node in running.get("/api/nodes").json()["nodes"]])
        yield running


def test_a_waiting_job_is_told_what_it_waits_for_and_nobody_elses_names(small: Server) -> None:
    others = {}
    for user, expected in (("secretuser1", 50), ("secretuser2", 90), ("secretuser3", 30)):
        others[user] = small.submit(user, LONG, expected_time=expected, competition_id="secretcomp")
        time.sleep(0.2)
    small.wait_for(others["secretuser2"], "secretuser2", ("running",))
    job = small.submit("alice", LONG, expected_time=20)
    status = small.status(job, "alice")
    first = small.status(others["secretuser1"], "secretuser1")
    assert status["queue_position"] == 2
    assert f"1 ahead; {first['node_id']} is free first, in about " in status["message"]
    assert "of 3 nodes 1 drained" in status["message"]
    start = seconds(first["started_at"]) + 50 + 30
    assert seconds(status["estimated_start"]) == pytest.approx(start, abs=2)
    assert seconds(status["estimated_finish"]) == pytest.approx(start + 20, abs=2)
    # Nothing is known of these users yet: their jobs may end at once, or at their limits.
    between = {name: seconds(when) for name, when in status["estimated_start_range"].items()}
    assert between["earliest"] == pytest.approx(time.time(), abs=3)
    assert between["latest"] == pytest.approx(seconds(first["started_at"]) + 100 + 60, abs=2)
    page = small.get("/api/jobs", "alice").text + small.get("/api/dashboard", "alice").text
    for secret in ("secretuser", "secretcomp", *others.values()):
        assert secret not in str(status)
        assert secret not in page
    small.run("main.py", "drain", "local-1")
    small.run("main.py", "drain", "local-2")
    told = "Waiting: no node takes jobs at the moment (of 3 nodes 3 drained)."
    wait_until(lambda: small.status(job, "alice")["message"] == told, what=told)
    assert small.status(job, "alice")["estimated_start_range"] is None


def test_the_range_is_learned_from_the_users_own_jobs_and_survives_a_restart(small: Server) -> None:
    for _ in range(3):
        small.run_job("alice", "import time; time.sleep(0.5)\n", expected_time=5)
    job = small.submit("alice", LONG, expected_time=300)

    def finish() -> tuple[float, float, float]:
        status = small.wait_for(job, "alice", ("running",))
        wait_until(lambda: small.status(job, "alice")["estimated_finish"])
        status = small.status(job, "alice")
        span = status["estimated_finish_range"]
        began = seconds(status["started_at"])
        return tuple(seconds(at) - began for at in (span["earliest"], status["estimated_finish"], span["latest"]))  # type: ignore[return-value]

    before = finish()
    # 0.5 s of 5 declared, and a little for the start: of 300 that makes 30 and a little more.
    assert 29 < before[0] <= before[1] <= before[2] < 150
    small.kill()
    small.start()
    assert finish() == pytest.approx(before, abs=1)
    bob = small.submit("bob", LONG, expected_time=300)
    small.wait_for(bob, "bob", ("running",))
    wait_until(lambda: small.status(bob, "bob")["estimated_finish"])
    status = small.status(bob, "bob")
    assert seconds(status["estimated_finish"]) - seconds(status["started_at"]) == pytest.approx(300, abs=0.01)
    assert seconds(status["estimated_finish_range"]["latest"]) - seconds(status["started_at"]) == pytest.approx(600)


def test_a_cancelled_job_teaches_nothing(small: Server) -> None:
    for _ in range(3):
        job = small.submit("alice", LONG)
        small.wait_for(job, "alice", ("running",))
        small.cancel(job, "alice")
        small.wait_for(job, "alice")
    job = small.submit("alice", LONG, expected_time=60)
    wait_until(lambda: small.status(job, "alice")["started_at"])
    status = small.status(job, "alice")
    assert seconds(status["estimated_finish"]) - seconds(status["started_at"]) == pytest.approx(60, abs=0.01)
