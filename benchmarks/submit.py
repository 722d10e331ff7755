"""Submissions a second, durable; how long the slowest wait; a burst of ten thousand users."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.load import Outcome, Wanted, apart
from benchmarks.measure import OURS, Findings, Goal, Side, bounded, compare, interleaved, skipped
from benchmarks.population import TOKEN, USER, filled
from benchmarks.references import reference
from benchmarks.servers import MeasuredServer, Run, multipart, profile_during

ORDER = 4
TITLE = "Submitting"
ABOUT = """
Each submission is a file of 5 KB by a user of its own; every node is busy, so the queue grows. An answer means that the
job, its code and the limit of one active job are in one transaction on disk. Beside it: a bare FastAPI endpoint that
takes the same form and does one synced SQLite insert, on the same uvicorn, without tokens, limits, queue or events; and
huey's `enqueue` of the same bytes into SQLite with `fsync`, called by as many threads, without HTTP. The burst: so many
users, each with a connection of his own, begin within one second; every answer is checked to be a row afterwards.
"""
CODE = b"x = 1  # a line of the code\n" * 180
ENDPOINT = "a FastAPI endpoint with one synced insert"
HUEY = "huey, enqueue"


def submission(port: int) -> str:
    """The request with marks for user and token."""
    config = {"competition_id": "comp", "project_id": "proj", "user_id": USER, "expected_time": 60, "token": TOKEN}
    body, kind = multipart(CODE, config)
    head = f"POST /api/submit HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body.decode()}"


class Submitters:
    """Users who have not submitted yet, for one round after the other."""

    def __init__(self, users: int) -> None:
        self._users = users
        self._next = 0

    def run(self, port: int, clients: int, seconds: float, *, opening: int = 0) -> Outcome:
        """Every answer must be 200."""
        left = self._users - self._next
        requests = clients if opening else left
        wanted = Wanted(port, submission(port), clients, seconds, requests, self._next, opening)
        outcome = apart(wanted)
        self._next += outcome.answered
        if outcome.refused or not outcome.answered:
            raise RuntimeError(f"{outcome.refused} refused, {outcome.answered} answered; {left} users were left")
        return outcome


def measure(run: Run) -> Findings:
    """At 8 and 64 clients beside the peers; then the burst."""
    findings = Findings()
    rounds, seconds = run.scaled(1, 4, 30), run.scaled(1, 8, 10) / 10
    burst = run.scaled(50, 10_000, 10_000)
    users = burst + run.scaled(3, 12, 62) * 2 * 2500
    if run.smoke:
        seconds, users = 0.1, 5000
    with contextlib.ExitStack() as things:
        folder = Path(things.enter_context(tempfile.TemporaryDirectory(prefix="submit-")))
        port, _ = things.enter_context(reference(folder))
        server = things.enter_context(filled(run, users=users))
        submitters = Submitters(users)
        for clients in (8, 64):
            outcomes: list[Outcome] = []
            sides: dict[str, Side] = {OURS: partial(rate_of, outcomes, submitters, server.port, clients, seconds)}
            if run.peers:
                sides[ENDPOINT] = partial(rate_of_endpoint, Wanted(port, submission(port), clients, seconds))
                if peers.found()["huey"]:
                    sides[HUEY] = partial(enqueued, folder, clients, seconds)
            values = interleaved(sides, rounds=rounds, seconds=run.seconds * 3)
            more = partial(submitters.run, server.port, clients, 3.0)
            findings.rows += compare(
                f"submissions, {clients} clients",
                "/s",
                values,
                {ENDPOINT: Goal(at_least=1.15)},
                profile=None if run.smoke else partial(profile_during, server.pid, 2, more),
            )
            if run.peers and not peers.found()["huey"]:
                findings.rows.append(skipped(f"submissions, {clients} clients", "/s", HUEY, "not installed"))
            slow = [outcome.percentile(0.99) / outcome.percentile(0.5) for outcome in outcomes[1:] or outcomes]
            findings.rows.append(bounded(f"slowest percent over the median, {clients} clients", "×", slow, at_most=4))
        findings.rows.append(
            bounded(
                f"last answer to a burst of {burst:,} users within a second",
                "s",
                [answered_burst(server, submitters, burst)],
                at_most=10,
                note="none lost",
            )
        )
    return findings


def rate_of(outcomes: list[Outcome], submitters: Submitters, port: int, clients: int, seconds: float) -> float:
    """Submissions a second; what came of them is added to `outcomes`."""
    outcomes.append(submitters.run(port, clients, seconds))
    return outcomes[-1].rate


def rate_of_endpoint(wanted: Wanted) -> float:
    """Requests a second, all of which must be 200."""
    outcome = apart(wanted)
    if outcome.refused:
        raise RuntimeError(f"{outcome.refused} of {outcome.answered} were refused")
    return outcome.rate


def answered_burst(server: MeasuredServer, submitters: Submitters, users: int) -> float:
    """Seconds from the first connection to the last answer; each of the users must have his job then."""
    before = rows(server)
    outcome = submitters.run(server.port, users, 60, opening=users)
    if rows(server) - before != users:
        raise RuntimeError(f"{users} were answered, {rows(server) - before} jobs are there")
    return outcome.seconds


def rows(server: MeasuredServer) -> int:
    """How many jobs the database has."""
    with closing(sqlite3.connect(f"file:{server.folder / 'database.db'}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM jobs").fetchone()[0])


def enqueued(folder: Path, threads: int, seconds: float) -> float:
    """Tasks a second that so many threads put into huey's queue."""
    from huey import SqliteHuey

    queue = SqliteHuey(filename=str(folder / "huey.db"), fsync=True)

    @queue.task(name="job")  # type: ignore[untyped-decorator]
    def job(code: bytes, config: dict[str, str]) -> None:
        """Never run: there is no consumer."""

    counts = [0] * threads
    began = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() - began < seconds:
            job(CODE, {"user_id": "alice", "competition_id": "comp"})
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)
