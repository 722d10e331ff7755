"""Reading a job's state and lists of jobs: the rate, and what is left of it when there are many jobs."""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.load import MARK, Wanted, apart
from benchmarks.measure import OURS, Findings, Goal, Row, Side, compare, interleaved, timed
from benchmarks.population import TOKEN, USER, filled
from benchmarks.references import reference
from benchmarks.servers import Client, MeasuredServer, Run, multipart, profile_during
from services import make_cursor

ORDER = 5
TITLE = "Reading a job's state"
ABOUT = """
Eight clients ask for the status of a waiting job: a token is looked up by its digest, the job by its id, its place in
the queue and its estimates from the forecast. Beside it: FastAPI's hello world on the same uvicorn; the same server
with next to no jobs; and with one waiting job instead of ten thousand. Then one client asks for pages of fifty jobs.
"""
CLIENTS = 8
HELLO = "FastAPI's hello world"
EMPTY = "the same with ten jobs"
SHORT = "the same with one waiting"
FIRST = "the first page"
PAGE = 50


class Asker:
    """A user with a waiting job, whose status is asked for."""

    def __init__(self, server: MeasuredServer) -> None:
        token = TOKEN.replace(MARK, "0000001")
        config = {"competition_id": "comp", "project_id": "proj", "user_id": USER.replace(MARK, "0000001")}
        body, kind = multipart(b"pass\n", {**config, "expected_time": 60, "token": token})
        with Client(server.port, token) as client:
            status, answer = client.post("/api/submit", body, kind)
        if status != 200:
            raise RuntimeError(f"a submission that should have been taken: {status} {answer!r}")
        self.server = server
        self.path = f"/api/status/{json.loads(answer)['job_id']}"
        self._head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {token}\r\n\r\n"

    def rate(self, seconds: float) -> float:
        """Answers a second."""
        return asked(self.server.port, f"GET {self.path} HTTP/1.1\r\n{self._head}", seconds)


def asked(port: int, request: str, seconds: float) -> float:
    """Answers a second, all of which must be 200."""
    outcome = apart(Wanted(port, request, CLIENTS, seconds))
    if outcome.refused:
        raise RuntimeError(f"{outcome.refused} of {outcome.answered} were refused: {request}")
    return outcome.rate


def measure(run: Run) -> Findings:
    """The rate, the rate with a million jobs and with ten thousand waiting, and the pages."""
    findings = Findings()
    rounds, seconds = run.scaled(1, 5, 25), run.scaled(1, 10, 20) / 20
    ended, pending = run.scaled(3000, 1_000_000, 1_000_000), run.scaled(100, 10_000, 10_000)
    with contextlib.ExitStack() as things:
        server = things.enter_context(filled(run, ended=ended if run.smoke else 0))
        few = Asker(server)
        if run.peers:
            port, _ = things.enter_context(reference(Path(things.enter_context(tempfile.TemporaryDirectory()))))
            hello = f"GET /hello HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
            sides: dict[str, Side] = {OURS: partial(few.rate, seconds), HELLO: partial(asked, port, hello, seconds)}
            findings.rows += compared(run, server, "status, 8 clients", sides, {HELLO: Goal(at_least=0.38)})
        many = few if run.smoke else Asker(things.enter_context(filled(run, ended=ended)))
        sides = {OURS: partial(many.rate, seconds), EMPTY: partial(few.rate, seconds)}
        figure = f"status, {ended:,} jobs"
        findings.rows += compared(run, many.server, figure, sides, {EMPTY: Goal(at_least=0.9)})
        waiting = few if run.smoke else Asker(things.enter_context(filled(run, pending=pending)))
        sides = {OURS: partial(waiting.rate, seconds), SHORT: partial(few.rate, seconds)}
        figure = f"status, {pending:,} waiting"
        findings.rows += compared(run, waiting.server, figure, sides, {SHORT: Goal(at_least=0.9)})
        client = things.enter_context(Client(many.server.port, many.server.token("root", admin=True)))
        deep = f"/api/jobs?limit={PAGE}&cursor={make_cursor(max(PAGE + 1, ended - 1000 * PAGE))}"
        first = f"/api/jobs?limit={PAGE}&cursor={make_cursor(ended)}"
        pages: dict[str, Side] = {OURS: partial(page, client, deep), FIRST: partial(page, client, first)}
        values = interleaved(pages, rounds=rounds * 4, seconds=run.seconds)
        findings.rows += compare("thousandth page of jobs", "ms", values, {FIRST: Goal(at_most=1.1)})
    return findings


def compared(
    run: Run, server: MeasuredServer, figure: str, sides: dict[str, Side], goals: dict[str, Goal]
) -> list[Row]:
    """Rows of rates, with a profile where a goal is missed."""
    values = interleaved(sides, rounds=run.scaled(1, 5, 25), seconds=run.seconds * 3)
    shown = partial(profile_during, server.pid, 2, lambda: [sides[OURS]() for _ in range(4)])
    return compare(figure, "/s", values, goals, profile=None if run.smoke else shown)


def page(client: Client, path: str) -> float:
    """Milliseconds for a page, the median of some."""

    def ask() -> None:
        status, body = client.get(path)
        if status != 200 or len(json.loads(body)["jobs"]) != PAGE:
            raise RuntimeError(f"{path}: {status} {body[:200]!r}")

    return timed(ask, 9)
