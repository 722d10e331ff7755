"""The queue: every change of a job's state on real SQLite, its guards, its races, its questions and their plans."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings as rules
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import event, insert, text
from sqlalchemy.exc import IntegrityError

import database
import states
from auth import Authenticator, TokenDigest
from database import Database, Transaction
from errors import InvalidRequest, NotFound, TooManyRequests, Unauthenticated, Unprocessable
from estimates import Range
from models import jobs
from queue_manager import (
    CANCEL_REQUESTED,
    CANCELLED_NOW,
    CHEAP_VIEW,
    LEASE_SECONDS,
    RETRY_BACKOFF_MOST,
    Claim,
    JobRow,
    NewJob,
    Outcome,
    QueueManager,
    QueueView,
)
from tests.server import wait_until
from wakeups import IdleNodes

T = TypeVar("T")
WITHIN = 60.0
SECOND = 1_000_000
FINAL_EVENTS = set(states.FINAL)


class Clock:
    """Wall-clock microseconds that a test owns; each look is one later, so that no two instants are the same."""

    def __init__(self) -> None:
        self.value = 1_700_000_000 * SECOND
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self.value += 1
            return self.value

    def advance(self, seconds: float) -> None:
        with self._lock:
            self.value += int(seconds * SECOND)


class Soon(random.Random):
    """Backoffs of a thousandth of the most, so that nothing here waits for them."""

    def uniform(self, a: float, b: float) -> float:
        return 0.001


def new_job(user_id: str = "alice", **values: Any) -> NewJob:
    given: dict[str, Any] = {
        **{"competition_id": "comp", "project_id": "proj", "expected_time": 60.0, "time_limit": 120.0},
        **{"config": {"user_id": user_id}, "code": b"print()", "request_digest": b"d" * 32, "request_id": "req"},
        **values,
    }
    return NewJob(user_id=user_id, **given)


def outcome(state: str = states.COMPLETED, **values: Any) -> Outcome:
    reason = states.EXIT_CODE if state == states.FAILED else None
    given: dict[str, Any] = {
        "message": "So it ended.",
        "completed_at": 1_800_000_000 * SECOND,
        "failure_reason": reason,
    }
    return Outcome(state=state, **{**given, **values})


@cache
def empty_database() -> Path:
    """A file with the schema, to copy; in memory where that is possible, and so is what is put beside it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=memory, prefix="gpu-job-server-test-"))
    Database(f"sqlite:///{folder / 'database.db'}").close()
    return folder / "database.db"


@pytest.fixture(scope="module", autouse=True)
def _remove_empty_database() -> Iterator[None]:
    yield
    if empty_database.cache_info().currsize:
        shutil.rmtree(empty_database().parent)
        empty_database.cache_clear()


class World:
    """A database with one server's queue on it."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.clock = Clock()
        self.path = path
        shutil.copy(empty_database(), path)
        self.database = Database(f"sqlite:///{path}", server=True)
        self.database.start()
        self.queue = self.process(**options)

    def process(self, **options: Any) -> QueueManager:
        """The queue as another start of the server sees it."""
        return QueueManager(self.database, **{"now": self.clock, "rng": Soon(), **options})

    def submit(self, user_id: str = "alice", **values: Any) -> JobRow:
        row, created = self.database.write(self.queue.submit(new_job(user_id, **values)))
        assert created
        return row

    def claim(self, node_id: str = "node-1", queue: QueueManager | None = None, **options: Any) -> Claim:
        found = (queue or self.queue).claim(node_id, f"address of {node_id}", **options)
        assert found is not None
        return found

    def cancel(self, job_id: str) -> str:
        return self.database.write(self.queue.cancel(job_id, "user:alice", "cancel-req"))[0]

    def flush(self) -> None:
        """Wait for what was sent without waiting."""
        self.database.write(lambda transaction: None)

    def row(self, job_id: str) -> JobRow:
        found = self.queue.job(job_id)
        assert found is not None
        return found

    def story(self, job_id: str) -> list[tuple[str, str | None, str]]:
        return [(each.event, each.from_state, each.to_state) for each in self.queue.events(self.row(job_id).seq)]

    def everything(self) -> list[Any]:
        """All rows of all tables that a transition may touch."""
        with closing(sqlite3.connect(self.path)) as connection:
            return [
                connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("jobs", "job_events", "nodes")
            ]

    def raw(self, statement: str, **values: Any) -> None:
        self.database.write(lambda transaction: transaction.connection.execute(text(statement), values).rowcount)

    def close(self) -> None:
        self.database.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory: what a sync costs is not what is shown here."""
    with tempfile.TemporaryDirectory(dir=empty_database().parent) as made:
        yield Path(made)


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    made = World(folder / "database.db")
    yield made
    made.close()


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """The results of `work(0)` … `work(count - 1)`, all begun in the same moment."""
    start = threading.Barrier(count)

    def run(number: int) -> T:
        start.wait(WITHIN)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# -- the way of a job ----------------------------------------------------------------------------------------------


def test_a_job_from_submission_to_its_end(world: World) -> None:
    row = world.submit(code=b"\x00code", config={"a": ["é"]})
    assert (row.state, row.epoch, row.attempt, row.node_id, row.slot) == ("pending", 0, 0, None, 0)
    claim = world.claim("node-3")
    assert (claim.job_id, claim.epoch, claim.attempt, claim.node_id) == (row.job_id, 1, 1, "node-3")
    assert (claim.code, claim.config) == (b"\x00code", {"a": ["é"]})
    running = world.row(row.job_id)
    assert (running.state, running.owner, running.node_address) == ("running", world.queue.owner, "address of node-3")
    assert running.started_at is None
    assert running.lease_expires_at > world.clock.value
    world.clock.advance(5)
    before = world.clock.value
    world.queue.launched(claim, "boot-1")
    world.flush()
    started = world.row(row.job_id)
    assert started.boot_id == "boot-1"
    assert before < started.started_at <= world.clock.value
    ended = outcome(
        exit_code=0,
        stdout_bytes=5,
        stderr_bytes=6,
        stdout_truncated=True,
        result_file="f",
        result_bytes=7,
        result_sha256="s",
    )
    assert world.queue.finish(claim, ended) is True
    final = world.row(row.job_id)
    for name in ("state", "message", "completed_at", "exit_code", "stdout_bytes", "stderr_bytes", "stdout_truncated"):
        assert getattr(final, name) == getattr(ended, name), name
    for name in ("result_file", "result_bytes", "result_sha256", "failure_reason", "signal", "stderr_truncated"):
        assert getattr(final, name) == getattr(ended, name), name
    assert final.lease_expires_at is None
    assert final.node_id == "node-3"
    assert world.story(row.job_id) == [
        ("submitted", None, "pending"),
        ("claimed", "pending", "running"),
        ("started", "running", "running"),
        ("completed", "running", "completed"),
    ]
    events = world.queue.events(row.seq)
    assert [each.actor for each in events] == ["user:alice", *["node:node-3"] * 3]
    assert [each.attempt for each in events] == [0, 1, 1, 1]
    assert [each.epoch for each in events] == [0, 1, 1, 1]
    assert {each.request_id for each in events} == {"req"}
    assert [each.node_id for each in events] == [None, *["node-3"] * 3]


def test_jobs_are_taken_in_the_order_of_their_submission(world: World) -> None:
    rows = [world.submit(f"user{number}") for number in range(5)]
    assert [world.claim(f"node-{number}").seq for number in range(5)] == [row.seq for row in rows]
    assert world.queue.claim("node-9", "") is None


def launched(world: World, queue: QueueManager, claim: Claim) -> None:
    queue.launched(claim, "boot")
    world.flush()


def noted(world: World, queue: QueueManager, claim: Claim) -> None:
    queue.note(claim, "unreachable", "x")
    world.flush()


# Each operation of a holder of a claim, and what it gives when the claim is void.
HOLDER: dict[str, tuple[Callable[[World, QueueManager, Claim], Any], Any]] = {
    "renew": (lambda world, queue, claim: queue.renew(claim).held, False),
    "node lease": (lambda world, queue, claim: queue.set_node_lease(claim, 5.0), False),
    "launched": (launched, None),
    "note": (noted, None),
    "completed": (lambda world, queue, claim: queue.finish(claim, outcome()), False),
    "failed": (lambda world, queue, claim: queue.finish(claim, outcome(states.FAILED)), False),
    "cancelled": (lambda world, queue, claim: queue.finish(claim, outcome(states.CANCELLED)), False),
    "requeue": (lambda world, queue, claim: queue.requeue(claim, states.NODE_LOST, "Lost."), None),
    "give back": (lambda world, queue, claim: queue.give_back(claim, "Too late."), False),
}


def in_state(world: World, state: str) -> tuple[str, Claim]:
    """A job in this state and a claim that once held it."""
    row = world.submit()
    claim = world.claim()
    if state == states.PENDING:
        assert world.queue.requeue(claim, states.NODE_LOST, "Lost.") == states.PENDING
        world.clock.advance(RETRY_BACKOFF_MOST)
    elif state in states.FINAL:
        assert world.queue.finish(claim, outcome(state))
    assert world.row(row.job_id).state == state
    return row.job_id, claim


@pytest.mark.parametrize("operation", HOLDER)
@pytest.mark.parametrize("state", [states.PENDING, *states.FINAL])
def test_a_job_that_is_not_running_cannot_be_changed_by_a_claim(world: World, state: str, operation: str) -> None:
    _, claim = in_state(world, state)
    before = world.everything()
    act, void = HOLDER[operation]
    assert act(world, world.queue, claim) == void
    assert world.everything() == before


@pytest.mark.parametrize("operation", HOLDER)
def test_a_running_job_can_be_changed_by_its_claim(world: World, operation: str) -> None:
    job_id, claim = in_state(world, states.RUNNING)
    before = world.everything()
    act, void = HOLDER[operation]
    given = act(world, world.queue, claim)
    assert given != void or void is None
    assert world.everything() != before
    state = {"requeue": "pending", "give back": "pending"}.get(operation, operation)
    assert world.row(job_id).state == (state if state in states.JOB_STATES else "running")


def test_only_a_pending_job_can_be_claimed_and_only_a_running_one_adopted(world: World) -> None:
    for state in (states.RUNNING, *states.FINAL):
        job_id, claim = in_state(world, state)
        before = world.everything()
        assert world.queue.claim("node-2", "") is None
        assert world.everything() == before
        if state == states.RUNNING:
            adopted = world.queue.adopt("node-1")
            assert adopted is not None
            assert (adopted.job_id, adopted.epoch, adopted.attempt) == (job_id, claim.epoch + 1, claim.attempt)
            assert world.queue.finish(adopted, outcome())
        else:
            assert world.queue.adopt("node-1") is None
            assert world.everything() == before
    in_state(world, states.PENDING)
    before = world.everything()
    assert world.queue.adopt("node-1") is None
    assert world.everything() == before


@pytest.mark.parametrize("state", states.FINAL)
def test_a_job_that_has_ended_cannot_be_cancelled(world: World, state: str) -> None:
    job_id, _ = in_state(world, state)
    before = world.everything()
    with pytest.raises(InvalidRequest, match=f"already ended: it is {state}"):
        world.cancel(job_id)
    assert world.everything() == before


def test_a_pending_job_is_cancelled_at_once_and_a_running_one_on_its_node(world: World) -> None:
    row = world.submit()
    assert world.cancel(row.job_id) == CANCELLED_NOW
    final = world.row(row.job_id)
    assert (final.state, final.message) == ("cancelled", "Cancelled before it started.")
    assert world.story(row.job_id) == [("submitted", None, "pending"), ("cancelled", "pending", "cancelled")]

    told: list[str] = []
    world.queue.cancel_hint = told.append
    job_id, claim = in_state(world, states.RUNNING)
    assert not world.queue.renew(claim).cancel_requested
    assert world.cancel(job_id) == CANCEL_REQUESTED
    assert world.cancel(job_id) == CANCEL_REQUESTED  # asking twice is fine and told once
    assert told == ["node-1"]
    assert world.row(job_id).state == "running"
    renewal = world.queue.renew(claim)
    assert renewal.held
    assert renewal.cancel_requested
    assert world.queue.finish(claim, outcome(states.CANCELLED))
    assert [each[0] for each in world.story(job_id)] == ["submitted", "claimed", "cancel_requested", "cancelled"]
    assert world.queue.events(world.row(job_id).seq)[-1].actor == "user:alice"  # who wanted it, not who did it


def test_an_unknown_job_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match="no-such-job"):
        world.cancel("no-such-job")
    assert world.queue.job("no-such-job") is None


# -- stale claims --------------------------------------------------------------------------------------------------


def stale_claims(world: World, *, restarted: bool) -> dict[str, tuple[QueueManager, Claim]]:
    """Claims on one job that runs now under another claim, each void for another reason."""
    world.submit()
    found = {"given back": (world.queue, world.claim())}
    world.queue.give_back(found["given back"][1], "Too late.")
    found["requeued"] = (world.queue, world.claim("node-2"))
    world.queue.requeue(found["requeued"][1], states.NODE_LOST, "Lost.")
    world.clock.advance(RETRY_BACKOFF_MOST)
    found["adopted by this process"] = (world.queue, world.claim("node-1"))
    second = world.queue.adopt("node-1")
    assert second is not None
    found["adopted again"] = (world.queue, second)
    current = (world.process() if restarted else world.queue).adopt("node-1")
    assert current is not None
    assert current.epoch == 5
    if restarted:
        # The epoch alone is not enough: a process that never owned it may guess it.
        found["of a process that never owned it"] = (world.queue, current)
    else:
        # Nor is the owner alone, nor a number that will be right one day.
        found["of the future"] = (world.queue, replace(current, epoch=6))
    return found


@pytest.mark.parametrize("operation", HOLDER)
@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "next process"])
def test_a_stale_claim_changes_nothing(world: World, operation: str, restarted: bool) -> None:
    claims = stale_claims(world, restarted=restarted)
    before = world.everything()
    act, void = HOLDER[operation]
    for why, (queue, claim) in claims.items():
        assert act(world, queue, claim) == void, why
        assert world.everything() == before, why


def test_adoption_voids_the_former_epoch_and_keeps_what_is_known(world: World) -> None:
    job_id, claim = in_state(world, states.RUNNING)
    world.queue.launched(claim, "boot-1")
    assert world.queue.set_node_lease(claim, 900.0)
    assert world.cancel(job_id) == CANCEL_REQUESTED
    following = world.process()
    adopted = following.adopt("node-1")
    assert adopted is not None
    assert (adopted.epoch, adopted.attempt) == (claim.epoch + 1, claim.attempt)
    assert (adopted.boot_id, adopted.node_lease, adopted.cancel_requested) == ("boot-1", 900.0, True)
    assert adopted.started_at is not None
    assert adopted.code == claim.code
    assert following.finish(adopted, outcome(states.CANCELLED))
    assert not world.queue.finish(claim, outcome())
    assert world.row(job_id).state == states.CANCELLED


def test_a_lease_is_extended_by_its_renewal(world: World) -> None:
    job_id, claim = in_state(world, states.RUNNING)
    first = world.row(job_id).lease_expires_at
    world.clock.advance(30)
    world.queue.renew(claim)
    assert world.row(job_id).lease_expires_at - first >= 30 * SECOND
    assert world.row(job_id).lease_expires_at - world.clock.value <= LEASE_SECONDS * SECOND


# -- the limits are in the database --------------------------------------------------------------------------------


def test_the_limit_of_active_jobs_holds_even_for_raw_sql(world: World) -> None:
    row = world.submit("alice")
    other = world.submit("bob")
    with pytest.raises(IntegrityError, match="UNIQUE"):
        world.raw("UPDATE jobs SET user_id = 'alice' WHERE seq = :seq", seq=other.seq)
    world.claim("node-1")
    with pytest.raises(IntegrityError, match="UNIQUE"):  # running counts as well as pending
        world.raw("UPDATE jobs SET user_id = 'alice' WHERE seq = :seq", seq=other.seq)
    values = {column.name: getattr(row, column.name) for column in jobs.c if column.name != "seq"}
    with pytest.raises(IntegrityError, match="UNIQUE"):
        world.database.write(
            lambda transaction: (
                transaction.connection.execute(insert(jobs).values(**{**values, "job_id": "x"})).rowcount
            )
        )
    assert world.cancel(other.job_id) == CANCELLED_NOW
    world.raw("UPDATE jobs SET user_id = 'alice' WHERE seq = :seq", seq=other.seq)  # an ended one is none of them


def test_a_node_runs_one_job_even_for_raw_sql(world: World) -> None:
    for user in ("alice", "bob"):
        world.submit(user)
    world.claim("node-1")
    second = world.claim("node-2")
    with pytest.raises(IntegrityError, match="UNIQUE"):
        world.raw("UPDATE jobs SET node_id = 'node-1' WHERE seq = :seq", seq=second.seq)
    world.submit("carol")
    before = world.everything()
    with pytest.raises(IntegrityError, match="UNIQUE"):  # a worker that forgot what it holds
        world.queue.claim("node-1", "")
    assert world.everything() == before


def test_two_jobs_never_have_the_same_result_file(world: World) -> None:
    for user in ("alice", "bob"):
        world.submit(user)
    first, second = world.claim("node-1"), world.claim("node-2")
    assert world.queue.finish(first, outcome(result_file="same.jsonl"))
    with pytest.raises(IntegrityError, match="UNIQUE"):
        world.queue.finish(second, outcome(result_file="same.jsonl"))
    assert world.row(second.job_id).state == "running"


def test_a_user_may_have_as_many_active_jobs_as_the_setting_says(folder: Path) -> None:
    world = World(folder / "database.db", max_active_jobs=3)
    rows = [world.submit() for _ in range(3)]
    assert sorted(row.slot for row in rows) == [0, 1, 2]
    with pytest.raises(TooManyRequests, match="Queue limit exceeded: you already have 3 pending or running jobs"):
        world.submit()
    world.submit("bob")  # of another user
    claim = world.claim()
    with pytest.raises(TooManyRequests):
        world.submit()
    assert world.queue.finish(claim, outcome())
    assert world.submit().slot == rows[0].slot  # the place is free again
    with pytest.raises(TooManyRequests):
        world.queue.refuse_at_limit("alice")
    world.queue.refuse_at_limit("bob")
    world.close()


def test_the_refusal_says_when_to_come_back(world: World) -> None:
    def retry_after() -> float:
        with pytest.raises(TooManyRequests, match="a pending or running job") as raised:
            world.submit()
        assert raised.value.retry_after is not None
        return raised.value.retry_after

    row = world.submit(expected_time=600.0, time_limit=1200.0)
    assert retry_after() == 600
    claim = world.claim()
    world.queue.launched(claim, "boot")
    world.flush()
    world.clock.advance(100)
    assert 499 <= retry_after() <= 500
    world.clock.advance(10_000)
    assert retry_after() == 1
    assert world.queue.finish(claim, outcome())
    world.submit(expected_time=86_400.0)
    assert retry_after() == 3600
    assert world.row(row.job_id).state == "completed"


# -- infrastructure failures ---------------------------------------------------------------------------------------


def test_a_requeued_job_waits_a_moment_and_goes_to_another_node(folder: Path) -> None:
    world = World(folder / "database.db", rng=random.Random(5))
    row = world.submit()
    claim = world.claim("node-1")
    world.queue.launched(claim, "boot")
    assert world.queue.requeue(claim, states.NODE_LOST, "The node is gone.") == "pending"
    back = world.row(row.job_id)
    assert (back.state, back.owner, back.node_id, back.started_at) == ("pending", None, None, None)
    assert (back.avoid_node, back.infra_failures, back.epoch, back.attempt) == ("node-1", 1, 1, 1)
    assert back.message == "The node is gone. The job will run again on another node."
    wait = (back.not_before - world.clock.value) / SECOND
    assert 0 < wait <= 2
    assert world.queue.claim("node-2", "") is None  # not yet
    count, due = world.queue.pending_now()
    assert count == 1
    assert due is not None
    assert 0 < due <= wait
    world.clock.advance(wait)
    assert world.queue.claim("node-1", "") is None  # not there
    again = world.claim("node-2")
    assert (again.seq, again.epoch, again.attempt) == (row.seq, 2, 2)
    assert world.row(row.job_id).message is None
    assert world.queue.pending_now() == (0, None)
    world.close()


def test_the_avoided_node_may_take_the_job_when_there_is_no_other(world: World) -> None:
    job_id, _ = in_state(world, states.PENDING)
    assert world.queue.claim("node-1", "") is None
    assert world.claim("node-1", take_avoided=True).job_id == job_id


def test_a_job_that_others_must_take_holds_up_nobody(world: World) -> None:
    in_state(world, states.PENDING)
    later = world.submit("bob")
    assert world.claim("node-1").seq == later.seq


def test_after_its_retries_a_job_fails_and_says_that_it_was_not_the_code(world: World) -> None:
    row = world.submit()
    for attempt in (1, 2, 3):
        claim = world.claim(f"node-{attempt}")
        assert claim.attempt == attempt
        state = world.queue.requeue(claim, states.LAUNCH_FAILED, "It did not start.")
        assert state == ("pending" if attempt < 3 else "failed")
        world.clock.advance(RETRY_BACKOFF_MOST)
    final = world.row(row.job_id)
    assert (final.state, final.failure_reason, final.exit_code) == ("failed", states.LAUNCH_FAILED, None)
    assert final.completed_at is not None
    assert "It did not start. Given up after 3 attempts; this was not your code's fault." in final.message
    assert world.queue.claim("node-9", "") is None
    story = world.story(row.job_id)
    assert [each[0] for each in story] == ["submitted", *["claimed", "requeued"] * 2, "claimed", "failed"]
    assert sum(each[2] in states.FINAL for each in story) == 1
    counters = world.queue.node_rows()
    assert [counters[f"node-{number}"].infra_failures for number in (1, 2, 3)] == [1, 1, 1]
    assert counters["node-3"].jobs_failed == 0  # not the job's doing


@pytest.mark.parametrize("retries", [0, 1])
def test_the_number_of_retries_is_a_setting(folder: Path, retries: int) -> None:
    world = World(folder / "database.db", max_infra_retries=retries)
    world.submit()
    seen = []
    for number in range(retries + 1):
        seen.append(world.queue.requeue(world.claim(f"node-{number}"), states.NODE_LOST, "Lost."))
        world.clock.advance(RETRY_BACKOFF_MOST)
    assert seen == ["pending"] * retries + ["failed"]
    world.close()


def test_the_waits_between_retries_grow_and_are_bounded(folder: Path) -> None:
    class Longest(Soon):
        def uniform(self, a: float, b: float) -> float:
            return b

    world = World(folder / "database.db", max_infra_retries=8, rng=Longest())
    world.queue._offer_later = lambda seconds: None  # type: ignore[method-assign]  # no timers of minutes
    row = world.submit()
    waits = []
    for number in range(8):
        world.queue.requeue(world.claim(f"node-{number}"), states.NODE_LOST, "Lost.")
        waits.append(round((world.row(row.job_id).not_before - world.clock.value) / SECOND))
        world.clock.advance(RETRY_BACKOFF_MOST)
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    world.close()


def test_a_job_that_was_to_be_cancelled_is_not_run_again(world: World) -> None:
    job_id, claim = in_state(world, states.RUNNING)
    assert world.cancel(job_id) == CANCEL_REQUESTED
    assert world.queue.requeue(claim, states.NODE_LOST, "The node is gone.") == "cancelled"
    final = world.row(job_id)
    assert (final.state, final.failure_reason) == ("cancelled", None)
    assert world.queue.events(final.seq)[-1].actor == "user:alice"
    assert world.queue.claim("node-2", "") is None


def test_a_job_that_was_to_be_cancelled_is_not_given_back(world: World) -> None:
    job_id, claim = in_state(world, states.RUNNING)
    assert world.cancel(job_id) == CANCEL_REQUESTED
    assert world.queue.give_back(claim, "The node answered too late.")
    final = world.row(job_id)
    assert (final.state, final.message) == ("cancelled", "Cancelled before it started.")
    assert world.story(job_id)[-1] == ("cancelled", "running", "cancelled")
    assert world.queue.events(final.seq)[-1].actor == "user:alice"
    assert world.queue.claim("node-2", "") is None


def test_a_job_that_is_given_back_costs_no_retry(world: World) -> None:
    row = world.submit()
    for number in range(10):
        claim = world.claim(f"node-{number}")
        assert world.queue.give_back(claim, "The node answered too late.")
    back = world.row(row.job_id)
    assert (back.state, back.infra_failures, back.not_before) == ("pending", 0, 0)
    assert back.avoid_node == "node-9"
    assert back.epoch == back.attempt == 10
    assert world.queue.node_rows() == {}


def test_nodes_are_counted_by_what_happened_on_them(world: World) -> None:
    for state in (states.COMPLETED, states.FAILED, states.FAILED, states.CANCELLED, states.COMPLETED):
        world.submit()
        assert world.queue.finish(world.claim("node-1"), outcome(state))
    row = world.queue.node_rows()["node-1"]
    assert (row.jobs_completed, row.jobs_failed, row.jobs_cancelled) == (2, 2, 1)
    assert (row.infra_failures, row.consecutive_failed_jobs) == (0, 0)
    world.submit()
    assert world.queue.finish(world.claim("node-1"), outcome(states.FAILED))
    world.submit()
    assert world.queue.requeue(world.claim("node-1"), states.NODE_LOST, "Lost.") == "pending"
    row = world.queue.node_rows()["node-1"]
    assert (row.infra_failures, row.consecutive_infra_failures, row.consecutive_failed_jobs) == (1, 1, 1)


def test_a_drained_node_is_given_nothing(world: World) -> None:
    world.submit()
    world.database.write(world.queue.set_drained("node-1", True, "admin:root"))
    assert world.queue.claim("node-1", "", take_avoided=True) is None
    world.database.write(world.queue.set_drained("node-1", False, "admin:root"))
    assert world.queue.claim("node-1", "") is not None


# -- events --------------------------------------------------------------------------------------------------------


def test_no_change_without_its_event(world: World) -> None:
    """Each change fails as a whole when its event cannot be written."""
    _, claim = in_state(world, states.RUNNING)
    job_id = world.submit("bob").job_id
    world.raw("CREATE TRIGGER no_events BEFORE INSERT ON job_events BEGIN SELECT RAISE(ABORT, 'no events'); END")
    before = world.everything()
    attempts: dict[str, Callable[[], Any]] = {
        "submit": lambda: world.submit("carol"),
        "claim": lambda: world.queue.claim("node-2", ""),
        "adopt": lambda: world.queue.adopt("node-1"),
        "finish": lambda: world.queue.finish(claim, outcome()),
        "requeue": lambda: world.queue.requeue(claim, states.NODE_LOST, "Lost."),
        "give back": lambda: world.queue.give_back(claim, "Late."),
        "cancel": lambda: world.cancel(job_id),
    }
    for name, attempt in attempts.items():
        with pytest.raises(IntegrityError, match="no events"):
            attempt()
        assert world.everything() == before, name
    world.queue.launched(claim, "boot")
    world.flush()
    assert world.everything() == before
    world.raw("DROP TRIGGER no_events")
    assert world.queue.finish(claim, outcome())


def test_waiters_are_told_after_the_change_is_durable(world: World) -> None:
    told: list[tuple[str, str]] = []

    def changed(job_id: str) -> None:
        with closing(sqlite3.connect(world.path)) as connection:
            (state,) = connection.execute("SELECT state FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        told.append((job_id, state))

    world.queue.watch.changed = changed  # type: ignore[method-assign]
    row = world.submit()
    claim = world.claim()
    world.queue.launched(claim, "boot")
    world.flush()
    world.cancel(row.job_id)
    world.queue.finish(claim, outcome(states.CANCELLED))
    assert told == [(row.job_id, state) for state in ("running", "running", "running", "cancelled")]
    world.queue.finish(claim, outcome())  # void: nothing to tell
    assert len(told) == 4


# -- idempotency ---------------------------------------------------------------------------------------------------


def test_a_key_names_one_job_for_ever(world: World) -> None:
    def submit(**values: Any) -> tuple[JobRow, bool]:
        return world.database.write(world.queue.submit(new_job(**values)))

    first, created = submit(idempotency_key="key")
    assert created
    for _ in range(2):
        again, created = submit(idempotency_key="key")
        assert not created
        assert again.job_id == first.job_id
    with pytest.raises(Unprocessable, match="Idempotency-Key was used for another"):
        submit(idempotency_key="key", request_digest=b"e" * 32)
    with pytest.raises(TooManyRequests):
        submit(idempotency_key="other")
    assert world.queue.finish(world.claim(), outcome())
    again, created = submit(idempotency_key="key")  # also after its end
    assert (again.job_id, again.state, created) == (first.job_id, "completed", False)
    of_bob, created = submit(user_id="bob", idempotency_key="key")
    assert created
    assert of_bob.job_id != first.job_id
    found = world.queue.job_by_key("alice", "key")
    assert found is not None
    assert found.job_id == first.job_id
    assert world.queue.job_by_key("alice", "nothing") is None
    assert sum(each[0] == "submitted" for each in world.story(first.job_id)) == 1


def test_submissions_that_come_together_each_have_their_own_end(world: World) -> None:
    def submit(*news: NewJob) -> list[Any]:
        found = world.database.write(world.queue.submit_all(news))
        return [each if isinstance(each, Exception) else (each[0].job_id, each[1]) for each in found]

    ((known, _),) = submit(new_job("key", idempotency_key="key"))
    (full,) = submit(new_job("full"))
    came = submit(
        new_job("user1"),
        new_job("full"),
        new_job("key", idempotency_key="key"),
        new_job("user2"),
        new_job("key", idempotency_key="key", request_digest=b"e" * 32),
        new_job("user1"),
        new_job("user3", code=b"print(3)"),
    )
    assert isinstance(came[1], TooManyRequests)
    assert came[2] == (known, False)
    assert isinstance(came[4], Unprocessable)
    assert isinstance(came[5], TooManyRequests)
    queued = [came[0][0], came[3][0], came[6][0]]
    assert all(created for _, created in (came[0], came[3], came[6]))
    order = [row.job_id for row in world.queue.first_pending(10)]
    assert order == [known, full[0], *queued]
    for job_id in order:
        assert [event[0] for event in world.story(job_id)] == ["submitted"]
    claims = [world.claim(f"node-{number}") for number in range(5)]
    assert [claim.job_id for claim in claims] == order
    assert claims[-1].code == b"print(3)"


def test_submissions_of_one_user_that_come_together_fill_all_places(tmp_path: Path) -> None:
    world = World(tmp_path / "places.db", max_active_jobs=3)
    came = world.database.write(world.queue.submit_all([new_job("alice") for _ in range(5)]))
    assert [isinstance(each, Exception) for each in came] == [False] * 3 + [True] * 2
    assert [row.job_id for row in world.queue.first_pending(10)] == [
        each[0].job_id for each in came if not isinstance(each, Exception)
    ]
    world.close()


# -- races ---------------------------------------------------------------------------------------------------------


def final_events(world: World) -> Counter[str]:
    """Number of final events by job."""
    with world.database.reading() as connection:
        rows = connection.execute(
            text(
                "SELECT job_id, count(*) AS n FROM job_events JOIN jobs ON jobs.seq = job_seq "
                "WHERE to_state IN ('completed', 'failed', 'cancelled') GROUP BY job_id"
            )
        )
        return Counter({row.job_id: row.n for row in rows})


def test_two_hundred_submissions_of_one_user_make_one_job(world: World) -> None:
    def submit(_: int) -> str | None:
        try:
            return str(world.submit().job_id)
        except TooManyRequests:
            return None

    made = [job_id for found in at_once(50, lambda number: [submit(number) for _ in range(4)]) for job_id in found]
    assert len(made) == 200
    assert sum(job_id is not None for job_id in made) == 1
    assert world.queue.counts()["pending"] == 1


def test_many_submissions_fill_every_place_and_no_more(folder: Path) -> None:
    world = World(folder / "database.db", max_active_jobs=3)

    def submit(number: int) -> str | None:
        try:
            return str(world.submit(f"user{number % 4}").job_id)
        except TooManyRequests:
            return None

    made = [job_id for job_id in at_once(40, submit) if job_id is not None]
    assert len(made) == len(set(made)) == 12
    world.close()


def test_one_key_sent_many_times_at_once_makes_one_job(world: World) -> None:
    def submit(_: int) -> tuple[str, bool]:
        row, created = world.database.write(world.queue.submit(new_job(idempotency_key="key")))
        return row.job_id, created

    answers = at_once(40, submit)
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1


def test_cancel_and_finish_at_once_end_in_one_state(world: World) -> None:
    for _ in range(30):
        job_id, claim = in_state(world, states.RUNNING)

        def act(who: int, job_id: str = job_id, claim: Claim = claim) -> Any:
            if who < 2:
                return world.queue.finish(claim, outcome())
            try:
                return world.cancel(job_id)
            except InvalidRequest:
                return "already"

        finished = at_once(4, act)
        assert sorted(finished[:2]) == [False, True]
        assert set(finished[2:]) <= {CANCEL_REQUESTED, "already"}
        assert world.row(job_id).state == "completed"
        assert (world.row(job_id).cancel_requested_at is not None) == (CANCEL_REQUESTED in finished)
    assert set(final_events(world).values()) == {1}


def test_cancel_and_claim_at_once_agree(world: World) -> None:
    seen = set()
    for _ in range(30):
        row = world.submit()

        def act(who: int, row: JobRow = row) -> Any:
            return world.queue.claim("node-1", "") if who == 0 else world.cancel(row.job_id)

        claim, answer = at_once(2, act)
        final = world.row(row.job_id)
        if claim is None:
            assert (answer, final.state) == (CANCELLED_NOW, "cancelled")
        else:
            assert (answer, final.state) == (CANCEL_REQUESTED, "running")
            assert world.queue.renew(claim).cancel_requested
            assert world.queue.finish(claim, outcome(states.CANCELLED))
        seen.add(answer)
    assert set(final_events(world).values()) == {1}
    assert seen  # which of the two comes first is not ours to choose


def test_requeue_adopt_finish_and_cancel_at_once_leave_one_holder(world: World) -> None:
    for _ in range(20):
        job_id, claim = in_state(world, states.RUNNING)
        following = world.process()

        def act(who: int, job_id: str = job_id, claim: Claim = claim, following: QueueManager = following) -> Any:
            if who == 0:
                return world.queue.finish(claim, outcome())
            if who == 1:
                return following.adopt("node-1")
            if who == 2:
                return world.queue.requeue(claim, states.NODE_LOST, "Lost.")
            try:
                return world.cancel(job_id)
            except InvalidRequest:
                return None

        done, adopted, requeued, _ = at_once(4, act)
        # Whoever came first has it; after an adoption the former holder changes nothing.
        assert sum((bool(done), adopted is not None, requeued is not None)) == 1
        row = world.row(job_id)
        if adopted is not None:
            assert row.state == "running"
            assert following.finish(adopted, outcome())
        elif row.state == "pending":
            world.cancel(job_id)
        assert world.row(job_id).state in states.FINAL
    assert set(final_events(world).values()) == {1}


def _is_queued(world: World, count: int) -> bool:
    return world.database._queue.qsize() == count


def queued(world: World, works: list[Callable[[], Any]]) -> list[Any]:
    """What the works give whose writes reach the database in just this order, before any of them is answered."""
    reached, gate = threading.Event(), threading.Event()

    def hold(_: Transaction) -> None:
        reached.set()
        assert gate.wait(WITHIN)

    first = world.database.send(hold)
    assert reached.wait(WITHIN)
    with ThreadPoolExecutor(len(works)) as pool:
        futures = []
        for number, work in enumerate(works, start=1):
            futures.append(pool.submit(work))
            wait_until(partial(_is_queued, world, number), WITHIN, "the write to be queued")
        gate.set()
        first.result(WITHIN)
        return [future.result(WITHIN) for future in futures]


def test_a_renewal_and_an_adoption_in_either_order_leave_one_holder(world: World) -> None:
    for renewal_first in (True, False):
        job_id, claim = in_state(world, states.RUNNING)
        following = world.process()
        world.clock.advance(10)
        before = world.row(job_id).lease_expires_at
        works: list[Callable[[], Any]] = [partial(world.queue.renew, claim), partial(following.adopt, "node-1")]
        results = queued(world, works if renewal_first else works[::-1])
        renewal, adopted = results if renewal_first else results[::-1]
        assert renewal.held == renewal_first
        assert (adopted.job_id, adopted.epoch) == (job_id, claim.epoch + 1)
        assert world.row(job_id).lease_expires_at > before
        # Whatever came first: from now on only the adopter renews, and the former holder ends nothing.
        assert not world.queue.renew(claim).held
        assert following.renew(adopted).held
        assert not world.queue.finish(claim, outcome())
        assert following.finish(adopted, outcome())
    assert set(final_events(world).values()) == {1}


def test_a_job_that_is_forgotten_while_it_is_read_is_there_or_gone(world: World) -> None:
    for _ in range(30):
        job_id, _claim = in_state(world, states.COMPLETED)
        seq = world.row(job_id).seq

        def act(who: int, job_id: str = job_id, seq: int = seq) -> Any:
            if who == 0:
                return world.queue.forget([seq])
            row = world.queue.job(job_id)
            return row if row is None else (row.state, [event.event for event in world.queue.events(row.seq)])

        count, *seen = at_once(5, act)
        assert count == 1
        for found in seen:
            # Gone before the row or between the row and its events, or all of it: never some of its events.
            assert found in (None, ("completed", []), ("completed", ["submitted", "claimed", "completed"]))
        assert world.queue.job(job_id) is None
        assert world.queue.events(seq) == []


def test_eight_claimers_over_eight_hundred_jobs_take_each_once(world: World) -> None:
    # Two connections that write, as of two processes: one of them only should, but the rows must hold all the same.
    second = Database(f"sqlite:///{world.path}")
    second.start()
    queues = [world.queue, QueueManager(second, now=world.clock, rng=Soon())]
    futures = [world.database.send(world.queue.submit(new_job(f"user{number}"))) for number in range(800)]
    seqs = [future.result(WITHIN)[0].seq for future in futures]

    def work(who: int) -> list[int]:
        queue = queues[who % 2]
        taken = []
        while (claim := queue.claim(f"node-{who}", "")) is not None:
            taken.append(claim.seq)
            assert queue.finish(claim, outcome())
        return taken

    taken = at_once(8, work)
    second.close()
    assert sorted(seq for found in taken for seq in found) == sorted(seqs)  # none twice, none lost
    assert all(found == sorted(found) for found in taken)
    assert world.queue.counts() == {"pending": 0, "running": 0, "completed": 800, "failed": 0, "cancelled": 0}
    assert len(final_events(world)) == 800
    assert set(final_events(world).values()) == {1}
    assert sum(row.jobs_completed for row in world.queue.node_rows().values()) == 800


# -- questions -----------------------------------------------------------------------------------------------------


def fill(world: World, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """So many jobs of seven users in all states, at most one active each; the oldest first."""
    chance = random.Random(seed)
    active: set[str] = set()
    rows = []
    busy: set[str] = set()
    for number in range(count):
        user = f"user{chance.randrange(7)}"
        state = chance.choice(states.JOB_STATES)
        node = f"node-{chance.randrange(4)}"
        if state in states.ACTIVE and (user in active or (state == "running" and node in busy)):
            state = "completed"
        if state in states.ACTIVE:
            active.add(user)
        if state == "running":
            busy.add(node)
        rows.append(
            {
                **{"job_id": f"job-{number}", "user_id": user, "competition_id": f"comp{chance.randrange(3)}"},
                **{"project_id": f"proj{chance.randrange(3)}", "expected_time": 60.0, "time_limit": 120.0, "slot": 0},
                **{"state": state, "created_at": number, "request_digest": b"", "request_id": "", "epoch": 1},
                "completed_at": number if state in states.FINAL else None,
                "failure_reason": "timeout" if state == "failed" else None,
                "node_id": node if state == "running" else None,
                "owner": "x" if state == "running" else None,
                "lease_expires_at": 1 if state == "running" else None,
                "idempotency_key": f"key{number}" if number % 2 else None,
            }
        )
    world.database.write(lambda transaction: transaction.connection.execute(insert(jobs), rows).rowcount)
    world.raw("INSERT INTO job_inputs SELECT seq, '{}', x'' FROM jobs WHERE state IN ('pending', 'running')")
    return rows


def test_pages_show_every_job_once_newest_first(world: World) -> None:
    rows = fill(world, 60)
    seen: list[str] = []
    before = None
    while page := world.queue.jobs_page(filters={}, before_seq=before, limit=7):
        assert len(page) <= 7
        seen += [row.job_id for row in page]
        before = page[-1].seq
        # What comes and changes meanwhile moves nothing.
        world.submit(f"new{len(seen)}")
    assert seen == [row["job_id"] for row in reversed(rows)]


def test_pages_can_be_filtered_by_each_field_and_all_together(world: World) -> None:
    rows = fill(world, 200)

    def wanted(**values: Any) -> list[str]:
        return [row["job_id"] for row in reversed(rows) if all(row[name] == value for name, value in values.items())]

    def found(filters: dict[str, str], states_in: tuple[str, ...] = ()) -> list[str]:
        seen: list[str] = []
        before = None
        while page := world.queue.jobs_page(filters=filters, before_seq=before, limit=9, states_in=states_in):
            seen += [row.job_id for row in page]
            before = page[-1].seq
        return seen

    every: tuple[dict[str, str], ...] = (
        {"user_id": "user3"},
        {"competition_id": "comp1"},
        {"project_id": "proj2"},
        {"user_id": "user3", "competition_id": "comp1", "project_id": "proj2"},
        {"user_id": "nobody"},
    )
    for filters in every:
        assert found(filters) == wanted(**filters)
        assert found(filters, ("completed",)) == wanted(state="completed", **filters)
    active = found({}, states.ACTIVE)
    assert active == [row["job_id"] for row in reversed(rows) if row["state"] in states.ACTIVE]
    assert active


def test_counts_and_users_are_what_is_there(world: World) -> None:
    rows = fill(world, 150)
    assert world.queue.counts() == {state: sum(row["state"] == state for row in rows) for state in states.JOB_STATES}
    assert world.queue.counts("user2") == {
        state: sum(row["state"] == state and row["user_id"] == "user2" for row in rows) for state in states.JOB_STATES
    }
    assert set(world.queue.counts("nobody").values()) == {0}
    users = world.queue.users()
    assert {user["user_id"]: user["jobs"] for user in users} == Counter(row["user_id"] for row in rows)
    assert {user["user_id"]: user["active_jobs"] for user in users} == {
        user["user_id"]: sum(row["user_id"] == user["user_id"] and row["state"] in states.ACTIVE for row in rows)
        for user in users
    }
    assert users[0]["user_id"] == rows[-1]["user_id"]
    assert sorted(world.queue.running_nodes()) == sorted(row["node_id"] for row in rows if row["state"] == "running")


def test_old_jobs_are_forgotten_with_all_that_is_theirs_and_active_ones_never(world: World) -> None:
    old, _ = in_state(world, states.COMPLETED)
    young, claim = in_state(world, states.RUNNING)
    seqs = [world.row(job_id).seq for job_id in (old, young)]
    far = 2_000_000_000 * SECOND
    assert [row.job_id for row in world.queue.oldest_ended_before(far, 10)] == [old]
    assert world.queue.oldest_ended_before(1_800_000_000 * SECOND, 10) == []
    assert world.queue.forget(seqs) == 1
    assert world.queue.job(old) is None
    assert world.row(young).state == "running"
    with world.database.reading() as connection:
        for table in ("job_events", "job_inputs"):
            found = {row.job_seq for row in connection.execute(text(f"SELECT job_seq FROM {table}"))}
            assert found == {seqs[1]}, table
    assert world.queue.finish(claim, outcome())


def simulated(pending: list[int], free_in: list[int]) -> list[int]:
    """When each job starts, second by second: whenever a node is free, it takes the next job."""
    busy_until = list(free_in)
    starts: list[int] = []
    second = 0
    while len(starts) < len(pending):
        for node, until in enumerate(busy_until):
            if until <= second and len(starts) < len(pending):
                busy_until[node] = second + pending[len(starts)]
                starts.append(second)
        second += 1
    return starts


def test_positions_and_estimates_are_what_a_simulation_shows(folder: Path) -> None:
    chance = random.Random(7)
    for number in range(12):
        world = World(folder / f"{number}.db")
        world.clock = world.queue._now = StoppedClock()
        nodes = [f"node-{each}" for each in range(chance.randint(1, 4))]
        free_in: list[int] = []
        for node in nodes:
            if chance.random() < 0.6:
                expected, ran = chance.randint(5, 50), chance.randint(0, 80)
                world.submit(f"on-{node}", expected_time=float(expected), time_limit=expected * 2.0)
                claim = world.claim(node)
                world.queue.launched(claim, "boot")
                world.flush()
                world.raw(
                    "UPDATE jobs SET started_at = :at WHERE seq = :seq", at=world.clock() - ran * SECOND, seq=claim.seq
                )
                late = max(0.0, (expected * 2 - ran) / 2)
                free_in.append(expected - ran if ran < expected else -(-int(late * 2) // 2))
                if ran >= expected and late != int(late):
                    world.raw("UPDATE jobs SET time_limit = time_limit + 1 WHERE seq = :seq", seq=claim.seq)
            else:
                free_in.append(0)
        # A running job on a node that is out of use frees nothing.
        world.submit("elsewhere")
        world.claim("node-gone")
        lengths = [chance.randint(1, 40) for _ in range(chance.randint(0, 12))]
        rows = [world.submit(f"user{each}", expected_time=float(length)) for each, length in enumerate(lengths)]
        world.queue.usable_nodes = lambda nodes=nodes: nodes  # type: ignore[misc]
        world.queue.nodes_changed()
        view = world.queue.view()
        starts = simulated(lengths, free_in)
        for position, (row, start) in enumerate(zip(rows, starts, strict=True), start=1):
            place, expected_start = view.line.place(row.seq)
            assert place == position
            assert expected_start is not None
            assert expected_start.likely == pytest.approx(start, abs=0.001)
        assert view.newcomer_wait == pytest.approx(simulated([*lengths, 1], free_in)[-1], abs=0.001)
        assert (view.pending, view.running) == (len(lengths), sum(1 for each in world.queue.running_nodes()))
        world.close()


class StoppedClock(Clock):
    """A clock that stands still."""

    def __call__(self) -> int:
        return self.value


def test_without_nodes_there_is_a_position_and_no_time(world: World) -> None:
    row = world.submit()
    view = world.queue.view()
    assert (*view.line.place(row.seq), view.newcomer_wait) == (1, None, None)


def test_a_job_that_comes_is_added_to_a_view_that_is_dear_to_compute(world: World) -> None:
    world.queue.usable_nodes = lambda: ["node-1"]
    for number in range(5):
        world.submit(f"user{number}")
    wait_until(lambda: world.queue.view().pending == 5, WITHIN)
    view = world.queue.view()
    dear = world.queue._view = replace(view, taken=time.monotonic(), cost=100.0)
    row = world.submit("late")
    start = Range(0.0, 5 * 60.0, 5 * 120.0)
    wait_until(lambda: world.queue.view().line.place(row.seq) == (6, start), WITHIN)
    # Whatever else changes waits, and what is not known yet is last.
    world.claim()
    assert world.queue.view() is dear
    assert dear.line.place(row.seq + 1) == (7, Range(0.0, 6 * 60.0, 6 * 120.0))


def test_a_long_queue_is_looked_at_in_a_thread_and_jobs_that_come_meanwhile_are_not_lost(world: World) -> None:
    world.queue.usable_nodes = lambda: ["node-1"]
    rows = [world.submit(f"user{number}") for number in range(3)]
    world.queue._view = replace(world.queue.view(), cost=CHEAP_VIEW * 1.01)
    begun, go_on = threading.Event(), threading.Event()
    compute = world.queue._compute_view

    def slowly() -> QueueView:
        found = compute()
        begun.set()
        assert go_on.wait(WITHIN)
        return found

    world.queue._compute_view = slowly  # type: ignore[method-assign]
    world.cancel(rows[0].job_id)
    wait_until(lambda: world.queue.view() and begun.is_set(), WITHIN)
    late = world.submit("late")
    wait_until(lambda: world.queue.view().line.place(late.seq)[0] == 4, WITHIN)  # in what was known before
    go_on.set()
    wait_until(lambda: world.queue.view().line.place(late.seq)[0] == 3, WITHIN)
    assert [world.queue.view().line.place(row.seq)[0] for row in rows[1:]] == [1, 2]


def test_the_view_follows_every_change(world: World) -> None:
    world.queue.usable_nodes = lambda: ["node-1"]

    def shows(pending: int, running: int) -> None:
        wait_until(lambda: (world.queue.view().pending, world.queue.view().running) == (pending, running), WITHIN)

    row = world.submit()
    shows(1, 0)
    world.submit("bob")
    shows(2, 0)
    claim = world.claim()
    shows(1, 1)
    assert world.queue.requeue(claim, states.NODE_LOST, "Lost.") == "pending"
    shows(2, 0)
    world.cancel(row.job_id)
    shows(1, 0)
    world.queue.finish(world.claim(), outcome())
    shows(0, 0)


# -- query plans ---------------------------------------------------------------------------------------------------


def plans_of(world: World, act: Callable[[], Any]) -> list[tuple[str, list[str]]]:
    """Every statement that `act` has SQLite run, with the steps of its plan."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        seen.append((statement, parameters))

    run = database.execute_text

    def note_prepared(connection: Any, statement: str, parameters: list[Any]) -> Any:
        seen.append((statement, parameters))
        return run(connection, statement, parameters)

    engines = (world.database._engine, world.database._read_engine)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "execute_text", note_prepared)
            act()
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
    with closing(sqlite3.connect(world.path)) as connection:
        return [
            (statement, [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)])
            for statement, parameters in seen
            if statement.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
        ]


def steps_of(world: World, act: Callable[[], Any]) -> list[str]:
    """The plan steps that touch `jobs` or its events, or that sort."""
    return [
        step
        for _, steps in plans_of(world, act)
        for step in steps
        if "jobs" in step or "job_" in step or "B-TREE" in step
    ]


PARTIAL = ("ix_jobs_pending", "ix_jobs_running", "uq_jobs_node_running", "uq_jobs_user_slot")


def whole_scans(steps: list[str]) -> list[str]:
    """Steps that look at every job; going through an index of pending or running ones only is no such step."""
    return [step for step in steps if step.startswith("SCAN") and not any(name in step for name in PARTIAL)]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A queue with many jobs, most of them ended."""
    made = World(tmp_path_factory.mktemp("full") / "database.db")
    fill(made, 3000)
    yield made
    made.close()


def test_a_token_is_looked_up_by_its_index(full: World) -> None:
    def look() -> None:
        with pytest.raises(Unauthenticated):
            Authenticator(full.database, TokenDigest(b"k" * 32)).caller("no such token")

    assert [step for _, steps in plans_of(full, look) for step in steps] == [
        "SEARCH tokens USING INDEX uq_tokens_digest (digest=?)"
    ]


QUESTIONS: dict[str, tuple[Callable[[World], Any], str]] = {
    "claim": (lambda world: world.queue.claim("node-x", ""), "ix_jobs_state|ix_jobs_pending"),
    "adopt": (lambda world: world.queue.adopt("node-1"), "uq_jobs_node_running"),
    "queue": (lambda world: world.queue._compute_view(), "ix_jobs_state|ix_jobs_pending"),
    "running": (lambda world: world.queue.running_nodes(), "ix_jobs_state|ix_jobs_running|uq_jobs_node_running"),
    "pending": (lambda world: world.queue.pending_now(), "ix_jobs_state|ix_jobs_pending"),
    "pass on": (lambda world: world.queue.pass_on("node-1", True), "ix_jobs_state|ix_jobs_pending"),
    "pass on an avoided one": (lambda world: world.queue.pass_on("node-1", False), "ix_jobs_state|ix_jobs_pending"),
    "first pending": (lambda world: world.queue.first_pending(100), "ix_jobs_state|ix_jobs_pending"),
    "owners": (lambda world: world.queue.owners(["job-5", "job-6"]), "uq_jobs_job_id"),
    "jobs of users": (lambda world: world.queue.jobs_of(["user1", "user2"]), "ix_jobs_user"),
    "job": (lambda world: world.queue.job("job-5"), "uq_jobs_job_id"),
    "job by key": (lambda world: world.queue.job_by_key("user1", "key1"), "uq_jobs_idempotency"),
    "events": (lambda world: world.queue.events(5), "ix_job_events_job"),
    "counts of a user": (lambda world: world.queue.counts("user1"), "ix_jobs_user_state"),
    "limit": (lambda world: world.queue.refuse_at_limit("nobody"), "ix_jobs_user_state|uq_jobs_user_slot"),
    "page of a user": (
        lambda world: world.queue.jobs_page(filters={"user_id": "user1"}, before_seq=500, limit=10),
        "ix_jobs_user",
    ),
    "page of a competition": (
        lambda world: world.queue.jobs_page(filters={"competition_id": "comp1"}, before_seq=500, limit=10),
        "ix_jobs_competition",
    ),
    "page of a project": (
        lambda world: world.queue.jobs_page(filters={"project_id": "proj1"}, before_seq=None, limit=10),
        "ix_jobs_project",
    ),
    "page of a state": (
        lambda world: world.queue.jobs_page(filters={}, before_seq=500, limit=10, states_in=("completed",)),
        "ix_jobs_state",
    ),
    "page of a user and a state": (
        lambda world: world.queue.jobs_page(
            filters={"user_id": "user1"}, before_seq=500, limit=9, states_in=("failed",)
        ),
        "ix_jobs_user_state",
    ),
    "active jobs": (
        lambda world: world.queue.jobs_page(filters={}, before_seq=None, limit=100, states_in=states.ACTIVE),
        "ix_jobs_state",
    ),
    "active jobs of a user": (
        lambda world: world.queue.jobs_page(
            filters={"user_id": "user1"}, before_seq=None, limit=9, states_in=states.ACTIVE
        ),
        "ix_jobs_user_state|uq_jobs_user_slot",
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_from_its_index(full: World, question: str) -> None:
    ask, index = QUESTIONS[question]
    steps = steps_of(full, lambda: ask(full))
    assert steps
    assert any(name in step for step in steps for name in index.split("|")), steps
    assert not whole_scans(steps), steps


@pytest.mark.parametrize("question", [name for name in QUESTIONS if name.startswith("page")])
def test_a_page_is_never_sorted(full: World, question: str) -> None:
    ask, _ = QUESTIONS[question]
    assert not [step for step in steps_of(full, lambda: ask(full)) if "B-TREE" in step]


def test_a_page_of_all_goes_along_the_rows_and_stops(full: World) -> None:
    steps = steps_of(full, lambda: full.queue.jobs_page(filters={}, before_seq=None, limit=10))
    assert steps == ["SCAN jobs"]  # backwards from the newest; LIMIT ends it
    steps = steps_of(full, lambda: full.queue.jobs_page(filters={}, before_seq=100, limit=10))
    assert steps == ["SEARCH jobs USING INTEGER PRIMARY KEY (rowid<?)"]
    assert steps_of(full, lambda: full.queue.oldest_ended_before(1, 10)) == ["SCAN jobs"]


def test_every_change_of_a_job_finds_its_rows_by_index(folder: Path) -> None:
    world = World(folder / "database.db")
    fill(world, 300)
    world.raw(
        "UPDATE jobs SET state = 'cancelled', completed_at = 1, lease_expires_at = NULL WHERE completed_at IS NULL"
    )

    def life() -> None:
        row = world.submit(idempotency_key="k")
        with pytest.raises(TooManyRequests):
            world.submit(idempotency_key="l")
        claim = world.claim()
        world.queue.launched(claim, "boot")
        world.queue.renew(claim)
        world.queue.set_node_lease(claim, 5.0)
        world.queue.note(claim, "unreachable", "x")
        world.queue.requeue(claim, states.NODE_LOST, "Lost.")
        world.clock.advance(RETRY_BACKOFF_MOST)
        claim = world.claim("node-2")
        world.queue.give_back(claim, "Late.")
        claim = world.claim("node-3")
        world.cancel(row.job_id)
        world.queue.finish(claim, outcome(states.CANCELLED))
        with pytest.raises(InvalidRequest):
            world.cancel(row.job_id)
        world.queue.forget([row.seq])

    plans = plans_of(world, life)
    kinds = {statement.split()[0] for statement, _ in plans}
    assert kinds == {"SELECT", "INSERT", "UPDATE", "DELETE"}
    for statement, steps in plans:
        assert not whole_scans(steps), (statement, steps)
    world.close()


def test_the_search_for_whole_scans_can_find_one(full: World) -> None:
    def act() -> None:
        with full.database.reading() as connection:
            connection.execute(text("SELECT * FROM jobs WHERE message = 'x'")).first()

    assert whole_scans(steps_of(full, act)) == ["SCAN jobs"]


# -- wake-ups ------------------------------------------------------------------------------------------------------


def idle_nodes(*entries: tuple[str, int, int, float]) -> tuple[IdleNodes, list[str]]:
    idle = IdleNodes()
    woken: list[str] = []
    for node_id, infra_failures, failed_jobs, since in entries:
        idle.enter(node_id, infra_failures, failed_jobs, since, lambda node_id=node_id: woken.append(node_id))  # type: ignore[misc]
    return idle, woken


def test_the_healthiest_node_is_woken_first_then_the_longest_idle() -> None:
    idle, woken = idle_nodes(("e", 2, 0, 0.0), ("d", 1, 9, 1.0), ("b", 0, 0, 9.0), ("a", 0, 0, 5.0), ("c", 0, 1, 0.0))
    assert idle.waiting() == ["a", "b", "c", "d", "e"]
    for _ in range(5):
        assert idle.offer()
    assert woken == ["a", "b", "c", "d", "e"]
    assert not idle.offer()  # each is woken once, until it enters again
    assert idle.waiting() == []


def test_a_node_that_left_or_is_passed_over_is_not_woken() -> None:
    idle, woken = idle_nodes(("a", 0, 0, 1.0), ("b", 0, 0, 2.0), ("c", 0, 0, 3.0))
    idle.leave("a")
    idle.leave("never there")
    assert idle.offer(besides="b")
    assert woken == ["c"]
    assert not idle.offer(besides="b")
    assert idle.offer()
    assert woken == ["c", "b"]


def test_entering_again_replaces_the_former_entry() -> None:
    idle, woken = idle_nodes(("a", 0, 0, 1.0), ("b", 0, 0, 2.0), ("a", 1, 0, 1.0))
    assert idle.waiting() == ["b", "a"]
    assert idle.offer()
    assert woken == ["b"]


def test_offers_at_once_wake_different_nodes() -> None:
    idle, woken = idle_nodes(*((f"node-{number}", 0, 0, float(number)) for number in range(64)))
    offered = at_once(8, lambda who: [idle.offer() for _ in range(9)])
    assert sum(sum(found) for found in offered) == 64
    assert len(woken) == len(set(woken)) == 64


class Node(threading.Thread):
    """A worker as far as waking goes: looks for work when woken and never by itself."""

    def __init__(self, world: World, number: int, ended: set[str], usable: int, luck: float | None = None) -> None:
        super().__init__(daemon=True)
        self.node_id = f"node-{number}"
        self.takes_jobs = True
        self.stopping = False
        self.world = world
        self._ended = ended
        self._chance = random.Random(number)
        self._luck = luck
        self._usable = usable
        self._woken = threading.Event()

    def wake(self) -> None:
        self._woken.set()

    def run(self) -> None:
        while not self.stopping:
            if not self.look():
                self._woken.wait()
            self._woken.clear()

    def look(self) -> bool:
        queue = self.world.queue
        if not self.takes_jobs:
            queue.idle.leave(self.node_id)
            queue.pass_on(self.node_id, claimed=True)
            return False
        queue.idle.enter(self.node_id, 0, 0, 0.0, self.wake)
        claim = queue.claim(self.node_id, "", take_avoided=self._usable <= 1)
        queue.pass_on(self.node_id, claimed=claim is not None)
        if claim is None:
            return False
        queue.idle.leave(self.node_id)
        luck = self._luck or self._chance.random()
        if luck < 0.15:
            queue.requeue(claim, states.NODE_LOST, "Lost.")
        elif luck < 0.3:
            queue.give_back(claim, "Late.")
        else:
            assert queue.finish(claim, outcome())
            self._ended.add(claim.job_id)
        return True


def end_nodes(world: World, nodes: list[Node]) -> None:
    for node in nodes:
        node.stopping = True
        node.wake()
    for node in nodes:
        node.join(WITHIN)
    world.close()


def test_a_wake_up_that_reached_a_resting_node_is_passed_on(folder: Path) -> None:
    world = World(folder / "database.db", now=time_us)
    ended: set[str] = set()
    nodes = [Node(world, number, ended, 3, luck=1.0) for number in range(3)]
    for node in nodes:
        node.start()
    try:
        for number in range(10):
            wait_until(lambda: world.queue.idle.waiting()[:1] == ["node-0"], WITHIN, "the first node to be idle")
            nodes[0].takes_jobs = False  # it is still in the list, and the first to be woken
            job_id = world.submit(f"user{number}").job_id
            wait_until(lambda job_id=job_id: job_id in ended, WITHIN, "another node to take the job")  # type: ignore[misc]
            nodes[0].takes_jobs = True
            nodes[0].wake()
    finally:
        end_nodes(world, nodes)


def test_a_wake_up_for_a_job_that_the_node_must_not_take_is_passed_on(folder: Path) -> None:
    world = World(folder / "database.db", now=time_us)
    ended: set[str] = set()
    nodes = [Node(world, number, ended, 2, luck=1.0) for number in range(2)]
    for node in nodes:
        node.start()
    try:
        for number in range(10):
            for node in nodes:
                node.takes_jobs = False
                node.wake()
            wait_until(lambda: not world.queue.idle.waiting(), WITHIN, "both nodes to rest")
            job_id = world.submit(f"user{number}").job_id
            claim = world.claim("node-0")  # held by an earlier connection of that node
            for node in nodes:
                node.takes_jobs = True
                node.wake()
            wait_until(lambda: world.queue.idle.waiting() == ["node-0", "node-1"], WITHIN, "both nodes to be idle")
            if number % 2:
                world.queue.give_back(claim, "Late.")
            else:
                world.queue.requeue(claim, states.NODE_LOST, "Lost.")
            wait_until(lambda job_id=job_id: job_id in ended, WITHIN, "the other node to take the job")  # type: ignore[misc]
            assert world.row(job_id).node_id == "node-1"
    finally:
        end_nodes(world, nodes)


def test_no_wake_up_is_lost_so_that_no_job_waits_beside_an_idle_node(folder: Path) -> None:
    world = World(folder / "database.db", max_infra_retries=1000, now=time_us)
    ended: set[str] = set()
    nodes = [Node(world, number, ended, 4) for number in range(4)]
    for node in nodes:
        node.start()
    made = 0
    try:
        for batch in range(40):
            # One node at a time does not take work, although it may be the one that is woken.
            resting = nodes[0 if batch % 3 else batch % 4]
            resting.takes_jobs = False
            submitters = batch % 3 + 1
            submitted = at_once(submitters, partial(submit_some, world, batch))
            wanted = {job_id for found in submitted for job_id in found}
            made += len(wanted)
            wait_until(lambda wanted=wanted: wanted <= ended, WITHIN, f"every job of batch {batch} to be run")  # type: ignore[misc]
            resting.takes_jobs = True
            resting.wake()
    finally:
        end_nodes(world, nodes)
    assert len(ended) == made


def time_us() -> int:
    return time.time_ns() // 1000


def submit_some(world: World, batch: int, who: int) -> list[str]:
    return [world.submit(f"user-{batch}-{who}-{number}").job_id for number in range(1 + batch % 2)]


# -- everything at random ------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A job as it must be."""

    user_id: str
    state: str = states.PENDING
    epoch: int = 0
    attempt: int = 0
    owner: str | None = None
    node_id: str | None = None
    avoid_node: str | None = None
    infra_failures: int = 0
    cancelling: bool = False
    started: bool = False
    waits: bool = False
    events: int = 1
    history: list[str] = field(default_factory=list)


USERS = st.sampled_from(("ann", "bob", "eve"))
NODE_IDS = ("node-1", "node-2", "node-3")
NODES = st.sampled_from(NODE_IDS)
ANY = st.integers(0, 1_000_000)  # picks one of what there is


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of what users, workers, restarts and the leftovers of former processes may do."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=empty_database().parent))
        self.world = World(self.folder / "database.db", max_infra_retries=1)
        self.queue = self.world.queue
        self.models: dict[int, Model] = {}
        self.seqs: list[int] = []
        self.claims: list[tuple[QueueManager, Claim]] = []
        self.sealed: dict[int, Any] = {}
        self.drained: set[str] = set()

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self.folder)

    @initialize(user=USERS, node=NODES)
    def begin(self, user: str, node: str) -> None:
        self.submit(user)
        self.claim(node, False)

    # -- what the model says

    def holds(self, queue: QueueManager, claim: Claim) -> bool:
        model = self.models[claim.seq]
        return (model.state, model.epoch, model.owner) == (states.RUNNING, claim.epoch, queue.owner)

    def running_on(self, node: str) -> int | None:
        return next(
            (seq for seq, each in self.models.items() if each.state == "running" and each.node_id == node), None
        )

    def end(self, seq: int, state: str) -> None:
        model = self.models[seq]
        model.state, model.events = state, model.events + 1

    # -- what users do

    @rule(user=USERS)
    def submit(self, user: str) -> None:
        busy = any(each.user_id == user and each.state in states.ACTIVE for each in self.models.values())
        try:
            row = self.world.submit(user)
        except TooManyRequests:
            assert busy
            return
        assert not busy
        self.models[row.seq] = Model(user)
        self.seqs.append(row.seq)

    @rule(pick=ANY)
    def cancel(self, pick: int) -> None:
        seq = self.seqs[-1 - (pick % min(len(self.seqs), 4))]
        model = self.models[seq]
        job_id = next(row.job_id for row in self.rows() if row.seq == seq)
        try:
            answer = self.world.cancel(job_id)
        except InvalidRequest:
            assert model.state in states.FINAL
            return
        if model.state == states.PENDING:
            assert answer == CANCELLED_NOW
            self.end(seq, states.CANCELLED)
        else:
            assert (answer, model.state) == (CANCEL_REQUESTED, states.RUNNING)
            model.events += not model.cancelling
        model.cancelling = True

    # -- what workers do

    @rule(node=NODES, take_avoided=st.booleans())
    def claim(self, node: str, take_avoided: bool) -> None:
        if self.running_on(node) is not None:  # a worker holds one claim at most
            free = [each for each in NODE_IDS if self.running_on(each) is None]
            if not free:
                return
            node = free[0]
        claim = self.queue.claim(node, "", take_avoided=take_avoided)
        fit = [
            seq
            for seq, each in self.models.items()
            if each.state == states.PENDING and not each.waits and (take_avoided or each.avoid_node != node)
        ]
        if claim is None:
            assert not fit or node in self.drained
            return
        assert node not in self.drained
        assert claim.seq == min(fit)
        model = self.models[claim.seq]
        model.epoch, model.attempt, model.events = model.epoch + 1, model.attempt + 1, model.events + 1
        model.state, model.owner, model.node_id = states.RUNNING, self.queue.owner, node
        assert (claim.epoch, claim.attempt) == (model.epoch, model.attempt)
        assert claim.cancel_requested == model.cancelling
        self.claims.append((self.queue, claim))

    @rule(node=NODES)
    def adopt(self, node: str) -> None:
        seq = self.running_on(node)
        if seq is None:  # rather a node where there is something to adopt
            node = next((each for each in NODE_IDS if self.running_on(each) is not None), node)
            seq = self.running_on(node)
        claim = self.queue.adopt(node)
        if claim is None:
            assert seq is None
            return
        assert claim.seq == seq
        model = self.models[claim.seq]
        model.epoch, model.owner, model.events = model.epoch + 1, self.queue.owner, model.events + 1
        assert (claim.epoch, claim.attempt, claim.cancel_requested) == (model.epoch, model.attempt, model.cancelling)
        assert (claim.started_at is not None) == model.started
        self.claims.append((self.queue, claim))

    @rule()
    def restart(self) -> None:
        """A new process; claims of the former ones are still around."""
        self.queue = self.world.queue = self.world.process(max_infra_retries=1)

    def pick_claim(self, pick: int) -> tuple[QueueManager, Claim, bool]:
        # The latest are the more interesting ones; the older are all stale.
        queue, claim = self.claims[-1 - (pick % min(len(self.claims), 6))]
        return queue, claim, self.holds(queue, claim)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def launched(self, pick: int) -> None:
        queue, claim, held = self.pick_claim(pick)
        queue.launched(claim, "boot")
        self.world.flush()
        if held:
            self.models[claim.seq].started = True
            self.models[claim.seq].events += 1

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def renew(self, pick: int) -> None:
        queue, claim, held = self.pick_claim(pick)
        renewal = queue.renew(claim)
        assert renewal.held == held
        assert renewal.cancel_requested == (held and self.models[claim.seq].cancelling)
        assert queue.set_node_lease(claim, 5.0) == held

    @precondition(lambda self: self.claims)
    @rule(pick=ANY, state=st.sampled_from(states.FINAL))
    def finish(self, pick: int, state: str) -> None:
        queue, claim, held = self.pick_claim(pick)
        assert queue.finish(claim, outcome(state)) == held
        if held:
            self.end(claim.seq, state)

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def requeue(self, pick: int) -> None:
        queue, claim, held = self.pick_claim(pick)
        found = queue.requeue(claim, states.NODE_LOST, "Lost.")
        if not held:
            assert found is None
            return
        model = self.models[claim.seq]
        model.infra_failures += 1
        model.avoid_node = claim.node_id
        again = states.FAILED if model.infra_failures > 1 else states.PENDING
        state = states.CANCELLED if model.cancelling else again
        assert found == state
        self.end(claim.seq, state)
        if state == states.PENDING:
            model.owner, model.node_id, model.started, model.waits = None, None, False, True

    @precondition(lambda self: self.claims)
    @rule(pick=ANY)
    def give_back(self, pick: int) -> None:
        queue, claim, held = self.pick_claim(pick)
        assert queue.give_back(claim, "Late.") == held
        if held:
            model = self.models[claim.seq]
            self.end(claim.seq, states.CANCELLED if model.cancelling else states.PENDING)
            model.owner, model.node_id, model.started, model.avoid_node = None, None, False, claim.node_id

    @rule()
    def time_passes(self) -> None:
        self.world.clock.advance(RETRY_BACKOFF_MOST)
        for model in self.models.values():
            model.waits = False

    @rule(node=NODES)
    def drain_or_resume(self, node: str) -> None:
        self.drained ^= {node}
        self.world.database.write(self.queue.set_drained(node, node in self.drained, "admin:root"))

    # -- what must hold after each step

    def rows(self) -> list[Any]:
        with self.world.database.reading() as connection:
            return list(connection.execute(text("SELECT * FROM jobs ORDER BY seq")))

    @invariant()
    def the_rows_are_what_the_model_says(self) -> None:
        rows = self.rows()
        assert [row.seq for row in rows] == list(self.models)
        for row in rows:
            model = self.models[row.seq]
            shown = (row.user_id, row.state, row.epoch, row.attempt, row.infra_failures, row.avoid_node)
            assert shown == (
                *(model.user_id, model.state, model.epoch, model.attempt, model.infra_failures),
                model.avoid_node,
            )
            if row.state in states.ACTIVE:
                assert (row.owner, row.node_id) == (model.owner, model.node_id)
                assert (row.started_at is not None) == model.started
                assert (row.cancel_requested_at is not None) == model.cancelling

    @invariant()
    def a_user_has_one_active_job_and_a_node_one_running(self) -> None:
        rows = self.rows()
        active = Counter(row.user_id for row in rows if row.state in states.ACTIVE)
        running = Counter(row.node_id for row in rows if row.state == states.RUNNING)
        assert max([0, *active.values()]) <= 1
        assert max([0, *running.values()]) <= 1

    @invariant()
    def what_has_ended_never_changes(self) -> None:
        for row in self.rows():
            if row.state in states.FINAL:
                assert self.sealed.setdefault(row.seq, tuple(row)) == tuple(row)
            else:
                assert row.seq not in self.sealed

    @invariant()
    def the_events_tell_one_legal_story(self) -> None:
        with self.world.database.reading() as connection:
            events = list(connection.execute(text("SELECT * FROM job_events ORDER BY id")))
        stories: dict[int, list[Any]] = {seq: [] for seq in self.models}
        for each in events:
            stories[each.job_seq].append(each)
        for seq, story in stories.items():
            model = self.models[seq]
            assert len(story) == model.events
            state, epoch = None, -1
            for each in story:
                assert each.from_state == state
                if (each.from_state, each.to_state) != (states.RUNNING, states.RUNNING):
                    assert (each.from_state, each.to_state) in states.TRANSITIONS
                assert state not in states.FINAL
                # Who takes a job over gets a higher number than anyone before; all others keep theirs.
                takes = each.event in ("submitted", "claimed", "adopted")
                assert each.epoch == epoch + 1 if takes else each.epoch == epoch
                state, epoch = each.to_state, each.epoch
            assert state == model.state
            assert sum(each.to_state in states.FINAL for each in story) == (model.state in states.FINAL)


TestAnySequence = QueueMachine.TestCase
TestAnySequence.settings = rules(deadline=None, max_examples=40, stateful_step_count=40, print_blob=True)
